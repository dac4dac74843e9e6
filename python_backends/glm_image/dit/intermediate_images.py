"""Checks and labels the intermediate images of a request, off the device's threads where a check may take long."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.preview_rpc import Delivery, IntermediateImage
from glm_image.provenance.files import FileTexts
from glm_image.provenance.writer import Provenance
from glm_image.request.parameters import SharedParameters
from glm_image.safety.checks import SafetyChecks, blurred


class IntermediateImages:
    """What happens to an intermediate image before it leaves the instance: as to the images of a request."""

    def __init__(self, provenance: Provenance, safety: SafetyChecks) -> None:
        self._provenance, self._safety = provenance, safety
        has_checks = safety.has_prompt_check or safety.has_image_check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dit-intermediate") if has_checks else None

    def finish(
        self,
        pixels: NDArray[np.uint8],
        deliver: Callable[[Delivery], None],
        *,
        is_blurred: bool = False,
        request: SharedParameters | None = None,
    ) -> None:
        """Passes an image, uint8 [height, width, 3], to ``deliver``, or the error of a check.

        The texts of a ``request`` are checked as well.
        """
        work = partial(self._finish, pixels, deliver, is_blurred, request)
        if self._thread is None:
            work()
        else:
            self._thread.submit(work)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _finish(
        self,
        pixels: NDArray[np.uint8],
        deliver: Callable[[Delivery], None],
        is_blurred: bool,
        request: SharedParameters | None,
    ) -> None:
        unlogged = RequestContext()  # the log of the request is about its images
        try:
            if request is not None:
                is_blurred |= self._safety.check_prompt(unlogged, request)
            is_blurred |= self._safety.check_image(unlogged, pixels)
            marked = self._provenance.marked(blurred(pixels) if is_blurred else pixels)
            made = IntermediateImage(marked, FileTexts.of(None, "", self._provenance.label(marked)).label)
        except Exception as error:  # fails this image only
            deliver(error)
            return
        deliver(made)

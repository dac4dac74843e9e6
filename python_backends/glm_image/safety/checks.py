"""Runs the checks of a hook, within their time limit, and says what follows from them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glm_image.errors import ContentRefusedError, SafetyCheckError
from glm_image.lifecycle.context import RequestContext
from glm_image.request.parameters import SharedParameters
from glm_image.safety.hooks import Hook, load_hook
from glm_image.safety.settings import SafetySettings
from glm_image.safety.verdict import ALLOWED, Action, Verdict
from glm_image.telemetry.metrics import Kind, MetricSink, MetricSpec, null_sink

logger = logging.getLogger(__name__)

CONCURRENT_CHECKS: Final = 8
"""Checks that run at the same time. One that hangs keeps its place: further checks exceed their time limit."""

BLURRED_SIDE: Final = 12
"""Pixels of the longer side to which a blurred image is reduced before it is enlarged again."""

FAILED: Final = "failed"
VERDICTS: Final = (*(action.value for action in Action), FAILED)

Checked = TypeVar("Checked")


def verdict_counters(prefix: str, checked: str) -> dict[str, MetricSpec]:
    """Returns the counters of the checks of ``prompt`` or ``image``, by verdict."""
    article = "an" if checked == "image" else "a"
    meaning = f"Safety checks of {article} {checked}, by outcome: {', '.join(VERDICTS)}"
    name = f"{prefix}_{checked}_checks_total"
    return {verdict: MetricSpec(name, Kind.COUNTER, meaning, outcome=verdict) for verdict in VERDICTS}


class SafetyChecks:
    """The checks of an instance.

    Args:
        settings: of the hook.
        prompt_counters: of ``verdict_counters``.
        image_counters: of ``verdict_counters``.
        record: receives them.

    Raises:
        ConfigurationError: the hook cannot be loaded.
    """

    def __init__(
        self,
        settings: SafetySettings,
        prompt_counters: Mapping[str, MetricSpec],
        image_counters: Mapping[str, MetricSpec],
        record: MetricSink = null_sink,
    ) -> None:
        self._hook: Hook = load_hook(settings)
        self._seconds, self._is_open = settings.safety_timeout_ms / 1000, settings.safety_on_failure == "allow"
        self._prompt_counters, self._image_counters, self._record = prompt_counters, image_counters, record
        self._places = threading.Semaphore(CONCURRENT_CHECKS)

    @property
    def has_prompt_check(self) -> bool:
        return self._hook.check_prompt is not None

    @property
    def has_image_check(self) -> bool:
        return self._hook.check_image is not None

    def check_prompt(self, context: RequestContext, request: SharedParameters) -> bool:
        """Checks the texts that an image shows; returns whether the request's images have to be blurred.

        Raises:
            ContentRefusedError: a text is refused.
            SafetyCheckError: the check failed, and failures refuse.
        """
        check = self._hook.check_prompt
        if check is None:
            return False
        verdicts = [self._verdict(check, text, "prompt") for text in (request.prompt, *(request.glyph_text or ()))]
        return self._follow(context, verdicts, "prompt", self._prompt_counters)

    def check_image(self, context: RequestContext, pixels: NDArray[np.uint8]) -> bool:
        """Checks an image, uint8 [height, width, 3]; returns whether it has to be blurred.

        Raises as ``check_prompt``.
        """
        check = self._hook.check_image
        if check is None:
            return False
        return self._follow(context, [self._verdict(check, pixels, "image")], "image", self._image_counters)

    def _verdict(self, check: Callable[[Checked], Verdict], checked: Checked, name: str) -> Verdict | None:
        """Returns the hook's verdict, or None if it gave none."""
        try:
            verdict = self._within_limit(check, checked)
            if isinstance(verdict, Verdict):
                return verdict
            logger.error("the safety check of a %s returned %s, which is no Verdict", name, type(verdict).__name__)
        except FutureTimeoutError:
            logger.error("the safety check of a %s exceeded its limit of %g s", name, self._seconds)
        except Exception:  # of the operator's own code
            logger.exception("the safety check of a %s failed", name)
        return None

    def _within_limit(self, check: Callable[[Checked], Verdict], checked: Checked) -> object:
        # A thread for each check: nothing but its own end stops a check that hangs, and no process waits for it.
        ends = time.monotonic() + self._seconds
        if not self._places.acquire(timeout=self._seconds):
            raise FutureTimeoutError
        future: Future[object] = Future()

        def run() -> None:
            try:
                future.set_result(check(checked))
            except BaseException as error:  # SystemExit too
                future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            finally:
                self._places.release()

        threading.Thread(target=run, name="safety-check", daemon=True).start()
        return future.result(max(0.0, ends - time.monotonic()))

    def _follow(
        self,
        context: RequestContext,
        verdicts: list[Verdict | None],
        checked: str,
        counters: Mapping[str, MetricSpec],
    ) -> bool:
        followed = [verdict or (ALLOWED if self._is_open else None) for verdict in verdicts]
        for verdict in verdicts:
            self._record(counters[FAILED if verdict is None else verdict.action.value], 1)
        strict = next((verdict for verdict in followed if verdict and verdict.action is Action.REFUSE), None)
        strict = strict or next((verdict for verdict in followed if verdict and verdict.action is Action.BLUR), None)
        if None in verdicts:
            context.attributes[f"{checked}_check"] = FAILED
        if strict is not None:
            context.attributes[f"{checked}_check"] = strict.action.value
            context.attributes[f"{checked}_check_reason"] = strict.reason
        if strict is not None and strict.action is Action.REFUSE:
            raise ContentRefusedError(checked)
        if None in followed:
            raise SafetyCheckError(checked)
        return strict is not None


def no_checks() -> SafetyChecks:
    """Returns checks that allow everything."""
    return SafetyChecks(SafetySettings(), {}, {})


def blurred(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns an image of the same shape in which only the coarsest colours are left, uint8 [height, width, 3]."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = BLURRED_SIDE / max(image.size)
    coarse = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    return np.array(coarse.resize(image.size, Image.Resampling.BICUBIC), np.uint8)

"""The responses of a stream: its progress, its intermediate images, and exactly one last response."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.ipc.client import EventListener
from glm_image.ipc.protocol import Event
from glm_image.lifecycle.context import NANOSECONDS
from glm_image.lifecycle.control import control
from glm_image.lifecycle.events import EventBuilder
from glm_image.lifecycle.preview_rpc import PreviewTokens, request_preview, unpack_image
from glm_image.request import images
from glm_image.serving.errors import relayed, triton_error
from glm_image.serving.tensors import response, text_array

logger = logging.getLogger(__name__)

HOLD_SECONDS: Final = 0.05
"""Before the first event: a request refused by then gets nothing but the error, over HTTP with its status."""
EVENT_SECONDS: Final = 0.05
"""Between two events of progress, and two questions to Triton whether the caller has disconnected."""

NO_OUTPUTS: Final[Mapping[str, NDArray[Any]]] = {
    "images": np.zeros((0, 0, 0, 3)),
    "images_base64": np.zeros(0, dtype=np.object_),
    "metadata": np.zeros(0, dtype=np.object_),
}


class StageError(Exception):
    """A stage responded with an error; the message is the stage's."""


class EventSender:
    """Takes over a request's response sender: any number of events, then one last response.

    Attributes:
        arrived_ns: the ``time.monotonic_ns()`` at which the request arrived.
    """

    def __init__(self, request: Any) -> None:
        self.arrived_ns = time.monotonic_ns()
        self._sender: Any = request.get_response_sender()
        self._lock = threading.Lock()

    def is_abandoned(self) -> bool:
        """Asks Triton whether the caller has disconnected."""
        with self._lock:  # the sender must not be used after its last response
            return self._sender is not None and bool(self._sender.is_cancelled())

    def send(self, event: Event, outputs: Mapping[str, NDArray[Any]] = NO_OUTPUTS, *, is_last: bool = False) -> None:
        """Sends an event, unless the last response has been sent."""
        with self._lock:
            if self._sender is None:
                return
            # Set here, so that the responses of several threads are in the order of their times.
            seconds = round((time.monotonic_ns() - self.arrived_ns) / NANOSECONDS, 3)
            texts = text_array(json.dumps({**event, "seconds": seconds}))
            self._respond(response({"event": texts, **NO_OUTPUTS, **outputs}), is_last=is_last)

    def send_image(self, event: Event, pixels: NDArray[np.uint8]) -> None:
        """Sends an event with an intermediate image, uint8 [height, width, 3]."""
        file = base64.b64encode(images.encode(pixels, "png"))
        self.send(event, {"images_base64": np.array([file], dtype=np.object_)})

    def fail(self, error: Exception) -> None:
        """Sends an error as the last response."""
        with self._lock:
            if self._sender is not None:
                made = relayed(str(error)) if isinstance(error, StageError) else triton_error(error)
                self._respond(pb_utils.InferenceResponse(error=made), is_last=True)

    @contextmanager
    def errors_sent(self) -> Iterator[None]:
        """Sends the exception that ends the block, whatever it is, as the last response."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def _respond(self, made: Any, *, is_last: bool) -> None:
        sender = self._sender
        if is_last:
            self._sender = None  # see ``Responder``
        sender.send(made, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)


class PreviewFetcher:
    """Has ``glm_dit`` render the preview of a request, in a thread of its own.

    Args:
        request_id: the id of the request.
        prompts: its prompt and negative prompt.
        guidance_scale: its guidance scale.
        steps: denoising steps of the preview.
        on_preview: called with the event of the tokens and the pixels, uint8 [height, width, 3].
    """

    def __init__(
        self,
        request_id: str,
        prompts: tuple[str, str],
        guidance_scale: float,
        steps: int,
        on_preview: Callable[[Event, NDArray[np.uint8]], None],
    ) -> None:
        self._request_id, self._prompts, self._guidance_scale = request_id, prompts, guidance_scale
        self._steps, self._on_preview = steps, on_preview
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="preview")  # started by the first preview

    def fetch(self, folder: Path, event: Event) -> None:
        """Starts to fetch the preview of the tokens that an event brought; ``folder`` is that of IPC sockets."""
        self._thread.submit(self._fetch, folder, event)

    def close(self) -> None:
        """Waits for the preview, if there is one."""
        self._thread.shutdown(wait=True)

    def _fetch(self, folder: Path, event: Event) -> None:
        try:
            tokens = PreviewTokens.unpack(event["preview"])
            pixels = request_preview(folder, self._request_id, tokens, self._prompts, self._guidance_scale, self._steps)
            if pixels is not None:
                self._on_preview(event, pixels)
        except Exception:  # the request goes on without it
            logger.exception("request %s gets no preview", self._request_id)


class ProgressRelay:
    """Turns the events that the stages publish into those of the stream, in a thread of its own, within a ``with``.

    Args:
        folder: the folder of IPC sockets; None = the stream gets only its first and last event.
        request_id: the id of the request.
        builder: builds the events.
        sender: sends them.
        previews: fetches the preview.
    """

    def __init__(
        self, folder: Path | None, request_id: str, builder: EventBuilder, sender: EventSender, previews: PreviewFetcher
    ) -> None:
        self._folder, self._request_id = folder, request_id
        self._builder, self._sender, self._previews = builder, sender, previews
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream-relay", daemon=True)
        self.has_cancelled = False
        """Whether the caller has disconnected, and the request is cancelled for that."""

    def __enter__(self) -> ProgressRelay:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Relays what has been published so far, so that it precedes the last response."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._done.wait(HOLD_SECONDS):
                return
            self._sender.send(self._builder.first())
            if self._folder is not None:
                self._relay(self._folder)
        except Exception:  # the request goes on without it
            logger.exception("the progress of request %s is not reported", self._request_id)

    def _relay(self, folder: Path) -> None:
        with EventListener(folder, self._request_id) as listener:
            is_done = False
            while not is_done:
                is_done = self._done.wait(EVENT_SECONDS)
                if not is_done:
                    self._cancel_if_abandoned(folder)
                self._send(folder, [event for event in listener.events(0) if self._builder.is_about(event)])

    def _cancel_if_abandoned(self, folder: Path) -> None:
        if not self.has_cancelled and self._sender.is_abandoned():
            self.has_cancelled = True
            control(folder, self._request_id, "cancel")

    def _send(self, folder: Path, published: Sequence[Event]) -> None:
        """Sends every image, and the latest of the progress between two images."""
        latest: Event | None = None
        for event in published:
            if "preview" in event:
                self._previews.fetch(folder, event)
            elif "estimate" in event:
                self._builder.progress(event)
                self._sender.send_image(self._builder.image("denoise", event), unpack_image(event["estimate"]))
                latest = None
            else:
                latest = self._builder.progress(event) or latest
        if latest is not None:
            self._sender.send(latest)

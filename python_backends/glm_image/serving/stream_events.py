"""The responses of a stream: its progress, its intermediate images, and exactly one last response."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from glm_image.ipc.client import EventListener
from glm_image.ipc.protocol import Event
from glm_image.lifecycle.context import NANOSECONDS
from glm_image.lifecycle.control import control
from glm_image.lifecycle.events import EventBuilder
from glm_image.lifecycle.preview_rpc import LATENT_PREVIEW_SKIPPED, unpack_image
from glm_image.request import images
from glm_image.serving.responder import Responder
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


def encoded_image(pixels: NDArray[np.uint8]) -> NDArray[np.object_]:
    """Returns an intermediate image, uint8 [height, width, 3], as the output ``images_base64`` with one PNG file."""
    return np.array([base64.b64encode(images.encode(pixels, "png"))], dtype=np.object_)


class EventSender(Responder):
    """Sends any number of events before the last response.

    Args:
        request: Triton's request.
        no_outputs: the outputs of an event without an image.

    Attributes:
        arrived_ns: the ``time.monotonic_ns()`` at which the request arrived.
    """

    def __init__(self, request: Any, no_outputs: Mapping[str, NDArray[Any]] = NO_OUTPUTS) -> None:
        super().__init__(request)
        self._no_outputs = no_outputs
        self.arrived_ns = time.monotonic_ns()

    def send_event(self, event: Event, outputs: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Sends an event, unless the last response has been sent."""
        with self._lock:
            if self._sender is not None:
                self._sender.send(
                    response({**self._no_outputs, **(outputs or {}), "event": self._timed(event)}), flags=0
                )

    def send_image(self, event: Event, pixels: NDArray[np.uint8]) -> None:
        """Sends an event with an intermediate image, uint8 [height, width, 3]."""
        self.send_event(event, {"images_base64": encoded_image(pixels)})

    def send_last(self, event: Event, outputs: Mapping[str, NDArray[Any]]) -> None:
        with self._lock:
            self.send({**outputs, "event": self._timed(event)})

    def _timed(self, event: Event) -> NDArray[np.object_]:
        """Returns an event as JSON; called with the lock, so that the events of all threads are in order of time."""
        seconds = (time.monotonic_ns() - self.arrived_ns) / NANOSECONDS
        return text_array(json.dumps({**event, "seconds": round(seconds, 3)}))


class ProgressRelay:
    """Turns the events that the stages publish into those of the stream, in a thread of its own, within a ``with``.

    Without a folder of IPC sockets the stream gets only its first and last event. ``on_preview`` is called with the
    folder and the event that has the tokens of the preview.
    """

    def __init__(
        self,
        folder: Path | None,
        request_id: str,
        builder: EventBuilder,
        sender: EventSender,
        on_preview: Callable[[Path, Event], object],
    ) -> None:
        self._folder, self._request_id = folder, request_id
        self._builder, self._sender, self._on_preview = builder, sender, on_preview
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream-relay", daemon=True)
        self.has_cancelled = False
        """Whether the caller has disconnected, and the request is cancelled for that."""

    def __enter__(self) -> ProgressRelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Relays what has been published so far, so that it precedes the last response."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._done.wait(HOLD_SECONDS):
                return
            self._sender.send_event(self._builder.first())
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
                self._on_preview(folder, event)
            elif LATENT_PREVIEW_SKIPPED in event:
                self._sender.send_event(self._builder.skipped(event, event[LATENT_PREVIEW_SKIPPED]))
            elif "latent_preview" in event:
                self._builder.progress(event)
                self._sender.send_image(self._builder.image("denoise", event), unpack_image(event["latent_preview"]))
                latest = None
            else:
                latest = self._builder.progress(event) or latest
        if latest is not None:
            self._sender.send_event(latest)

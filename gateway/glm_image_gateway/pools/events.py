"""The events of a stream over pools, made of those of the stages' streams."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from glm_image_client.transport import Outputs, object_array
from glm_image_gateway.pools.flights import position

NO_OUTPUTS: Final[Mapping[str, Any]] = {
    "images": np.zeros((0, 0, 0, 3), np.uint8),
    "images_base64": object_array([]),
    "metadata": object_array([]),
}
"""The outputs of an event without an image."""

Event = Mapping[str, Any]
Send = Callable[[Outputs], object]


class StreamEvents:
    """Sends the events of one request, in the form of ``glm_image_stream``.

    Args:
        request_id: of the request.
        send: receives the outputs of each event.
    """

    def __init__(self, request_id: str, send: Send) -> None:
        self._request_id, self._send = request_id, send
        self._began = time.monotonic()
        self._latest = (-1, 0)
        self._parts: dict[int, Event] = {}
        self.steps = 0
        """Denoising steps of all images, for the progress while some parts wait."""

    def queued(self, stage: str) -> None:
        """Reports that the request waits for a member of a pool."""
        self._progress({"event": "queued", "stage": stage, "done": 0, "total": 1, "eta": None})

    def of_ar(self, event: Event, dit_seconds: float) -> None:
        """Reports the progress of the first stage; ``dit_seconds`` are predicted for the second."""
        if event["event"] in {"queued", "prefill", "decode"}:
            eta = None if event["eta"] is None else round(event["eta"] + dit_seconds, 3)
            self._progress({**event, "eta": eta})

    def of_part(self, part: int, event: Event, outputs: Outputs) -> None:
        """Reports the progress of a part in the second stage, and its intermediate images."""
        if event["event"] == "preview_skipped" or (event["event"] == "denoise" and len(outputs["images_base64"])):
            self.put(event, {"images_base64": outputs["images_base64"]})
        elif event["event"] in {"queued", "denoise"}:
            self._parts[part] = event
            self._progress(self._joined(list(self._parts.values())))

    def _joined(self, parts: Sequence[Event]) -> Event:
        stage = max((str(part["stage"]) for part in parts), key=position)
        same = [part for part in parts if part["stage"] == stage]
        total = self.steps if stage == "denoise" and self.steps else sum(part["total"] for part in same)
        etas = [part["eta"] for part in same if part["eta"] is not None]
        return {
            **same[0],
            "done": sum(part["done"] for part in same),
            "total": total,
            "eta": max(etas, default=None),
        }

    def _progress(self, event: Event) -> None:
        """Sends an event, unless it is behind the last one, as after a call that is sent again."""
        place = (position(event["stage"]), int(event["done"]))
        if place > self._latest:
            self._latest = place
            self.put(event)

    def last(self, outputs: Outputs) -> None:
        """Sends the images."""
        self.put({"event": "image", "stage": "done", "done": 1, "total": 1, "eta": 0.0}, outputs)

    def put(self, event: Event, outputs: Mapping[str, Any] = NO_OUTPUTS) -> None:
        """Sends an event with outputs."""
        own = {"request_id": self._request_id, "seconds": round(time.monotonic() - self._began, 3)}
        text = json.dumps({**event, **own}).encode()
        self._send({**NO_OUTPUTS, **outputs, "event": object_array([text])})

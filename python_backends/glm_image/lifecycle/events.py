"""The events of ``glm_image_stream``, made of the events that the stages publish."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from glm_image.ipc.protocol import Event
from glm_image.lifecycle.registry import RequestState
from glm_image.request.stages import AR_STAGES, STAGE_ORDER, Stage

KINDS: Final[Mapping[Stage, str]] = {
    Stage.AR_QUEUE: "queued",
    Stage.PREFILL: "prefill",
    Stage.DECODE: "decode",
    Stage.DIT_QUEUE: "queued",
    Stage.CONDITION: "denoise",
    Stage.DENOISE: "denoise",
}
"""The kind of event that reports the progress of each stage; later stages have none."""


class EventBuilder:
    """Builds a stream's events in order, and estimates the remaining time.

    Args:
        request_id: the id of the request.
        arrived_ns: the ``time.monotonic_ns()`` at which it arrived, which no other request of that id shares.
        dit_seconds: how long the DiT takes for such a request; None = unknown.
        first_stage: where it begins.
    """

    def __init__(
        self,
        request_id: str,
        arrived_ns: int,
        dit_seconds: float | None = None,
        first_stage: Stage = Stage.AR_QUEUE,
    ) -> None:
        self._request_id, self._arrived_ns, self._dit_seconds = request_id, arrived_ns, dit_seconds
        self._first_stage = first_stage
        self._latest = (0, 0)
        self._stage_starts: dict[Stage, tuple[float, int]] = {}

    def is_about(self, published: Event) -> bool:
        return bool(published["arrived_ns"] == self._arrived_ns)

    def first(self) -> Event:
        return self._event("queued", self._first_stage, 0, 1, None)

    def progress(self, published: Event) -> Event | None:
        """Returns the event for a published progress; None if it is older than the last one, or ends the request."""
        if published["state"] == RequestState.FORWARDED:
            stage, done, total = Stage.DIT_QUEUE, 0, 1
        elif published["state"] == RequestState.RUNNING:
            stage, done, total = Stage(published["stage"]), int(published["done"]), int(published["total"])
        else:
            return None
        position = (STAGE_ORDER.index(stage), done)
        if stage not in KINDS or position <= self._latest:
            return None
        self._latest = position
        eta = self._eta(stage, done, total)
        return self._event(KINDS[stage], stage, done, total, published.get("seconds_left", eta))

    def image(self, kind: str, published: Event) -> Event:
        """Returns the event for an intermediate image: ``preview``, or ``denoise`` for a latent preview."""
        return self._event(kind, published["stage"], int(published["done"]), int(published["total"]), None)

    def skipped(self, published: Event, reason: Mapping[str, str]) -> Event:
        """Returns the event for an intermediate image that is not made; ``reason`` has its reason and message."""
        return {**self.image("preview_skipped", published), **reason}

    def preview_tokens(self, published: Event) -> Event:
        """Returns the event with the tokens of the preview, which another server renders."""
        return {**self.image("preview_tokens", published), "preview": published["preview"]}

    def last(self, kind: str = "image") -> Event:
        return self._event(kind, "done", 1, 1, 0.0)

    def _eta(self, stage: Stage, done: int, total: int) -> float | None:
        """Seconds to the finished images; to the end of the AR stage where the DiT's duration is unknown."""
        now = time.monotonic()
        started, done_before = self._stage_starts.setdefault(stage, (now, done))
        if done == done_before:
            return None
        left = (now - started) / (done - done_before) * (total - done)
        return left + (self._dit_seconds or 0.0) if stage in AR_STAGES else left

    def _event(self, kind: str, stage: str, done: int, total: int, eta: float | None) -> Event:
        return {
            "event": kind,
            "request_id": self._request_id,
            "stage": stage,
            "done": done,
            "total": total,
            "eta": None if eta is None else round(eta, 3),
        }

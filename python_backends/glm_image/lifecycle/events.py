"""A request told to who waits for it: events of the bus become the events of ``glm_image_stream``."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Final

from glm_image.ipc.protocol import Event
from glm_image.lifecycle.context import NANOSECONDS

KINDS: Final = {
    "ar_queue": "queued",
    "prefill": "prefill",
    "tokens": "tokens",
    "dit_queue": "queued",
    "condition": "denoise",
    "denoise": "denoise",
}
"""The kind of event that tells of each stage, in the order of the stages."""

ORDER: Final = tuple(KINDS)
KEPT_KINDS: Final = 256


class DitSecondsByKind:
    """How long the second stage took for the latest request of each kind, in seconds; for one thread at a time."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()

    def of(self, kind: Hashable) -> float | None:
        """Returns how long it took; None = not yet known."""
        return self._seconds.get(kind)

    def note(self, kind: Hashable, seconds: float) -> None:
        """Takes a time that was measured."""
        self._seconds[kind] = seconds
        self._seconds.move_to_end(kind)
        if len(self._seconds) > KEPT_KINDS:
            self._seconds.popitem(last=False)


class EventBuilder:
    """Puts a request's events in order and works out how long it still takes.

    Args:
        request_id: its id.
        arrived_ns: ``time.monotonic_ns()`` when it came; events of others that share the id have another.
        painting_seconds: how long the second stage takes for such a request; None = not known.
    """

    def __init__(self, request_id: str, arrived_ns: int, painting_seconds: float | None = None) -> None:
        self._request_id = request_id
        self._arrived_ns = arrived_ns
        self._painting_seconds = painting_seconds
        self._latest = (0, 0)
        self._began: dict[str, tuple[float, int]] = {}

    def is_about(self, told: Event) -> bool:
        """Whether an event of the bus is this request's."""
        return bool(told["arrived_ns"] == self._arrived_ns)

    def beginning(self) -> Event:
        """Returns the first event."""
        return self._event("queued", "ar_queue", 0, 1, None)

    def progress(self, told: Event) -> Event | None:
        """Returns the event for where the request is; None for what is over already or ends it."""
        if told["state"] not in {"running", "handed_on"}:
            return None
        stage, done, total = told["stage"], int(told["done"]), int(told["total"])
        if told["state"] == "handed_on":
            stage, done, total = "dit_queue", 0, 1
        if stage not in ORDER or (ORDER.index(stage), done) <= self._latest:
            return None
        self._latest = (ORDER.index(stage), done)
        return self._event(KINDS[stage], stage, done, total, self._eta(stage, done, total))

    def picture(self, kind: str, told: Event) -> Event:
        """Returns the event for a picture on the way: ``preview``, or ``denoise`` with where the request is."""
        return self._event(kind, told["stage"], int(told["done"]), int(told["total"]), None)

    def end(self) -> Event:
        """Returns the last event."""
        return self._event("image", "done", 1, 1, 0.0)

    def _eta(self, stage: str, done: int, total: int) -> float | None:
        """Seconds to the picture; where the second stage's time is not known, to the end of this stage."""
        now = time.monotonic()
        since, before = self._began.setdefault(stage, (now, done))
        if done == before:
            return None
        left = (now - since) / (done - before) * (total - done)
        is_first = ORDER.index(stage) < ORDER.index("dit_queue")
        return left + (self._painting_seconds or 0.0) if is_first else left

    def seconds(self) -> float:
        """Returns how long ago the request came."""
        return round((time.monotonic_ns() - self._arrived_ns) / NANOSECONDS, 3)

    def _event(self, kind: str, stage: str, done: int, total: int, eta: float | None) -> dict[str, Any]:
        return {
            "event": kind,
            "request_id": self._request_id,
            "stage": stage,
            "done": done,
            "total": total,
            "seconds": self.seconds(),
            "eta": None if eta is None else round(eta, 3),
        }

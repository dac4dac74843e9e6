"""Requests take turns at the device, an image each: ``dit.fair_queue`` decides whose turn it is."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from glm_image.dit.fair_queue import QUANTUM_SECONDS, DeficitRoundRobin

LEAST_SECONDS = 1e-6
"""Predicted for an image of which nothing is known."""


@dataclass(eq=False)
class Flow:
    """A request that takes turns.

    Attributes:
        images: how many are still to be denoised; the request's thread counts them down.
        predict: returns the seconds that the next image is expected to take, 0 if unknown.
        source_pixels: of its source images, as scaled for the model, whose keys and values are in memory from its first
            turn to its end.
        max_source_pixels: what the source images of all requests may have together, unless there are none but its own.
        has_read: whether its sources are in memory.
        needs_room: whether its sources exceeded the limit together with those of others, and wait until these end.
    """

    images: int
    predict: Callable[[], float]
    source_pixels: int = 0
    max_source_pixels: float = math.inf
    has_read: bool = False
    needs_room: bool = False

    @property
    def seconds_left(self) -> float:
        return self.images * self.predict()


class Turns:
    """Gives the device to one request at a time; each request waits in a thread of its own.

    A request keeps its place from one image to the next, so that the policy sees all that have images left.
    """

    def __init__(self, quantum_seconds: float = QUANTUM_SECONDS) -> None:
        self._policy: DeficitRoundRobin[Flow] = DeficitRoundRobin(quantum_seconds)
        self._flows: list[Flow] = []
        self._owner: Flow | None = None
        self._changed = threading.Condition()

    def wake(self) -> None:
        """Has the requests that wait look again whether they must go on."""
        with self._changed:
            self._changed.notify_all()

    @contextlib.contextmanager
    def taking_part(self, flow: Flow) -> Iterator[None]:
        """Within the block the request may take turns."""
        with self._changed:
            self._flows.append(flow)
            self._policy.add(flow)
        try:
            yield
        finally:
            with self._changed:
                self._flows.remove(flow)
                self._policy.remove(flow)
                self._release(flow)

    @contextlib.contextmanager
    def turn(self, flow: Flow, check: Callable[[], float]) -> Iterator[float]:
        """Waits for the request's turn, which lasts for the block; yields the seconds that it waited.

        ``check`` returns after how many seconds it is to be called again, and raises if the request must not go on.
        """
        began = time.monotonic()
        with self._changed:
            self._grant()
            while self._owner is not flow:
                seconds = check()
                self._changed.wait(None if seconds == math.inf else seconds)
        started = time.monotonic()
        try:
            yield started - began
        finally:
            with self._changed:
                self._policy.charge(flow, time.monotonic() - started)
                self._release(flow)

    def seconds_to_end(self, flow: Flow, own_seconds: float) -> float:
        """Returns the time until a request with ``own_seconds`` of work left is done, as the others share the device.

        While it runs, each other request uses as much of the device as it does, until its own work is done.
        """
        with self._changed:
            others = [other.seconds_left for other in self._flows if other is not flow]
        return own_seconds + sum(min(own_seconds, left) for left in others)

    def _release(self, flow: Flow) -> None:
        if self._owner is flow:
            self._owner = None
        self._grant()

    def _grant(self) -> None:
        if self._owner is None:
            costs = {flow: max(flow.predict(), LEAST_SECONDS) for flow in self._flows if self._may_run(flow)}
            self._owner = self._policy.next(costs)
            self._changed.notify_all()

    def _may_run(self, flow: Flow) -> bool:
        """Whether a request has an image left, and its source images are in memory or fit: in order of arrival."""
        if not flow.images:
            return False
        if not flow.source_pixels or flow.has_read:
            return True
        held = sum(other.source_pixels for other in self._flows if other.has_read)
        first = next(other for other in self._flows if other.source_pixels and not other.has_read)
        fits = not flow.needs_room and held + flow.source_pixels <= flow.max_source_pixels
        return flow is first and (not held or fits)

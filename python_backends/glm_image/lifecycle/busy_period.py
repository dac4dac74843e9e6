"""The earliest arrival of requests that state none: a cancel sent while they wait in Triton's queue applies to them."""

from __future__ import annotations

import time
from typing import Final

from glm_image.lifecycle.context import NANOSECONDS

IDLE_NS: Final = 2 * NANOSECONDS
"""Longer than Triton takes to pass an instance the next waiting request, on a busy host too."""


class BusyPeriod:
    """Since when an instance has had requests without a pause: none of them can have waited in the queue for longer."""

    def __init__(self) -> None:
        self.since_ns = 0
        self._ended_ns = 0

    def begin(self) -> None:
        """Records that a request has come out of the queue."""
        now = time.monotonic_ns()
        if now - self._ended_ns > IDLE_NS:
            self.since_ns = now

    def end(self) -> None:
        """Records that the instance takes the next request."""
        self._ended_ns = time.monotonic_ns()

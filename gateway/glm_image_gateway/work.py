"""How much work a request is, how many seconds that takes here, and how much of it a key may ask for in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

FIRST_SECONDS_PER_UNIT: Final = 0.3
"""Seconds of a megapixel-step before any has been measured."""
WEIGHT_OF_LATEST: Final = 0.3
MINUTE: Final = 60.0
ROUNDING: Final = 1e-9


def megapixel_steps(images: int, pixels: int, steps: int) -> float:
    """Returns the work of a request: images x megapixels x denoising steps."""
    return images * pixels / 1e6 * steps


class SpeedEstimate:
    """Seconds of a unit of work, such as a megapixel-step: a moving average of what requests took."""

    def __init__(self, seconds_per_unit: float = FIRST_SECONDS_PER_UNIT) -> None:
        self._seconds_per_unit = seconds_per_unit
        self._is_measured = False

    def seconds(self, work: float) -> float:
        """Returns the predicted seconds of work."""
        return work * self._seconds_per_unit

    def add(self, work: float, seconds: float) -> None:
        """Adds a measurement: the seconds in which the server worked on a request."""
        if work <= 0 or seconds <= 0:
            return
        share = WEIGHT_OF_LATEST if self._is_measured else 1.0
        self._seconds_per_unit += share * (seconds / work - self._seconds_per_unit)
        self._is_measured = True


class MinuteBudget:
    """Work that may be asked for in a minute: a bucket that fills continuously and holds a minute's work.

    A request that is larger than the bucket passes when the bucket is full, and leaves it in debt.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._available, self._filled = per_minute, clock()

    def take(self, work: float) -> float:
        """Takes work and returns 0, or takes nothing and returns the seconds to wait."""
        now = self._clock()
        self._available = min(self._per_minute, self._available + (now - self._filled) * self._per_minute / MINUTE)
        self._filled = now
        missing = min(work, self._per_minute) - self._available
        if missing > ROUNDING:
            return missing * MINUTE / self._per_minute
        self._available -= work
        return 0.0

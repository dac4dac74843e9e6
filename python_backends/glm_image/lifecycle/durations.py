"""Durations of the latest work of a kind, by which deadlines and waiting times are estimated."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Final

from glm_image.lifecycle.lru import LatestEntries

KEPT_DURATIONS: Final = 256
KEPT_KINDS: Final = 256


class DurationStats:
    """The latest durations of one kind of work, in seconds; 0 while none is known.

    Attributes:
        fastest: the least that the next one takes. A deadline that even this misses cannot be met.
        mean: the expected duration of the next one.
    """

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=KEPT_DURATIONS)
        self.fastest = 0.0
        self.mean = 0.0

    def add(self, seconds: float) -> None:
        self._durations.append(seconds)
        self.fastest = min(self._durations)
        self.mean = sum(self._durations) / len(self._durations)


class DurationStatsByKey:
    """The durations of each kind of work; the kinds that were not used for longest are dropped."""

    def __init__(self) -> None:
        self._stats: LatestEntries[Hashable, DurationStats] = LatestEntries(KEPT_KINDS)

    def of(self, kind: Hashable) -> DurationStats:
        stats = self._stats.get(kind) or DurationStats()
        self._stats.put(kind, stats)
        return stats

"""How long work takes, by the latest of its kind: what a deadline or a queue is judged by."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable

KEPT_TIMES = 256
KEPT_KINDS = 256


class DurationStats:
    """The latest times of one kind of work, in seconds; 0 while none is known.

    Attributes:
        fastest: what the next one takes at least. A deadline that even this misses cannot be met.
        mean: what the next one is expected to take.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=KEPT_TIMES)
        self.fastest = 0.0
        self.mean = 0.0

    def add(self, seconds: float) -> None:
        """Takes a time that was measured."""
        self._times.append(seconds)
        self.fastest = min(self._times)
        self.mean = sum(self._times) / len(self._times)


class DurationStatsByKey:
    """The pace of each kind of work; of the kinds longest unused none is kept."""

    def __init__(self) -> None:
        self._paces: OrderedDict[Hashable, DurationStats] = OrderedDict()

    def of(self, kind: Hashable) -> DurationStats:
        """Returns the pace of a kind, a new one where it is not known."""
        pace = self._paces.setdefault(kind, DurationStats())
        self._paces.move_to_end(kind)
        if len(self._paces) > KEPT_KINDS:
            self._paces.popitem(last=False)
        return pace

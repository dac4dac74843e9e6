"""What the engines measure while they run: each quantity declared once, whoever keeps the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Kind(Enum):
    """How values of a measure add up."""

    COUNTER = "counter"
    """A sum."""
    GAUGE = "gauge"
    """The last value counts."""
    HISTOGRAM = "histogram"
    """How many values fell below each bound."""


@dataclass(frozen=True)
class Measure:
    """A quantity, named as Prometheus has it: the unit at the end, ``_total`` for sums.

    Attributes:
        name: its name.
        kind: how its values add up.
        meaning: what it is, in a line.
        bounds: of a histogram, ascending.
    """

    name: str
    kind: Kind
    meaning: str
    bounds: tuple[float, ...] = ()


class Record(Protocol):
    """Takes values; called from the engines' own threads, so it returns at once and raises nothing."""

    def __call__(self, measure: Measure, value: float, times: int = 1, /) -> None:
        """Notes a value.

        Args:
            measure: of what.
            value: added to a counter, the state of a gauge, observed in a histogram; in the unit of the name.
            times: how often a histogram observes it.
        """


def keep_nothing(measure: Measure, value: float, times: int = 1, /) -> None:
    """The record of an engine nobody watches."""

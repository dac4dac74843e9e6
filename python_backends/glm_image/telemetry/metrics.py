"""What the engines measure while they run: each quantity declared once, whoever keeps the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from glm_image.errors import GlmImageError


class Kind(Enum):
    """How values of a measure add up."""

    COUNTER = "counter"
    """A sum."""
    GAUGE = "gauge"
    """The last value counts."""
    HISTOGRAM = "histogram"
    """How many values fell below each bound."""


@dataclass(frozen=True)
class MetricSpec:
    """A quantity, named as Prometheus has it: the unit at the end, ``_total`` for sums.

    Attributes:
        name: its name.
        kind: how its values add up.
        meaning: what it is, in a line.
        bounds: of a histogram, ascending.
        reason: what tells it from others of its name; "" = it is the only one.
    """

    name: str
    kind: Kind
    meaning: str
    bounds: tuple[float, ...] = ()
    reason: str = ""


class MetricSink(Protocol):
    """Takes values; called from the engines' own threads, so it returns at once and raises nothing."""

    def __call__(self, measure: MetricSpec, value: float, times: int = 1, /) -> None:
        """Notes a value.

        Args:
            measure: of what.
            value: added to a counter, the state of a gauge, observed in a histogram; in the unit of the name.
            times: how often a histogram observes it.
        """


REFUSALS: Final = ("invalid", "queue_full", "stopping", "memory")
"""Why a request may be refused; see ``reason`` of the error classes."""


@dataclass(frozen=True)
class OutcomeCounters:
    """How requests end at a stage, other than well.

    Attributes:
        cancels: those that were cancelled.
        deadline_misses: those whose time ran out or was too short.
        refusals: those refused, by why.
        failures: those that ended with a fault of the server.
    """

    cancels: MetricSpec
    deadline_misses: MetricSpec
    refusals: tuple[MetricSpec, ...]
    failures: MetricSpec

    @classmethod
    def of(cls, stage: str) -> OutcomeCounters:
        """Names them after a stage."""
        refused = "Requests refused, by reason: invalid, queue_full, stopping, memory"
        return cls(
            MetricSpec(f"{stage}_cancelled_requests_total", Kind.COUNTER, "Requests cancelled before they were done"),
            MetricSpec(
                f"{stage}_deadline_missed_requests_total",
                Kind.COUNTER,
                "Requests whose time ran out, or was too short for what was left to do",
            ),
            tuple(
                MetricSpec(f"{stage}_refused_requests_total", Kind.COUNTER, refused, reason=reason)
                for reason in REFUSALS
            ),
            MetricSpec(
                f"{stage}_failed_requests_total", Kind.COUNTER, "Requests that ended with a fault of the server"
            ),
        )

    @property
    def measures(self) -> tuple[MetricSpec, ...]:
        """All of them."""
        return (self.cancels, self.deadline_misses, *self.refusals, self.failures)

    def measure_of(self, error: BaseException) -> MetricSpec:
        """Returns the measure that counts a request that ended with ``error``."""
        reason = error.reason if isinstance(error, GlmImageError) else ""
        known = {"cancelled": self.cancels, "deadline": self.deadline_misses}
        known |= {refusal.reason: refusal for refusal in self.refusals}
        return known.get(reason, self.failures)


def null_sink(measure: MetricSpec, value: float, times: int = 1, /) -> None:
    """The record of an engine nobody watches."""

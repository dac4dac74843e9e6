"""The metrics of the engines: each is declared once, independently of who keeps its values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from glm_image.errors import GlmImageError
from glm_image.lifecycle.context import RequestContext, RequestObserver


class Kind(Enum):
    """How the values of a metric add up."""

    COUNTER = "counter"
    """Their sum."""
    GAUGE = "gauge"
    """The last value."""
    HISTOGRAM = "histogram"
    """The number of values below each bound."""


@dataclass(frozen=True)
class MetricSpec:
    """A metric, named by Prometheus' rules: the unit at the end, ``_total`` for counters.

    Attributes:
        name: the name.
        kind: how its values add up.
        meaning: the help text, one line.
        bounds: the bounds of a histogram, ascending.
        reason: the label that distinguishes metrics of one name; "" = no label.
    """

    name: str
    kind: Kind
    meaning: str
    bounds: tuple[float, ...] = ()
    reason: str = ""


class MetricSink(Protocol):
    """Records values. Engines call it from their own threads, so it returns immediately and raises nothing."""

    def __call__(self, metric: MetricSpec, value: float, times: int = 1, /) -> None:
        """Records a value.

        Args:
            metric: the metric.
            value: is added to a counter, replaces the value of a gauge, or is observed by a histogram.
            times: how often a histogram observes it.
        """


def null_sink(metric: MetricSpec, value: float, times: int = 1, /) -> None:
    """Records nothing."""


REFUSALS: Final = ("invalid", "queue_full", "stopping", "memory")
"""The reasons for refusing a request; see ``reason`` of the error classes."""


@dataclass(frozen=True)
class OutcomeCounters:
    """Counters of the requests of a stage that did not succeed.

    Attributes:
        cancels: cancelled requests.
        deadline_misses: requests that missed their deadline, or could not meet it.
        refusals: refused requests, one counter per reason.
        failures: requests that ended with an error of the server.
    """

    cancels: MetricSpec
    deadline_misses: MetricSpec
    refusals: tuple[MetricSpec, ...]
    failures: MetricSpec

    @classmethod
    def of(cls, prefix: str) -> OutcomeCounters:
        """Returns counters whose names begin with ``prefix``."""
        refused = "Requests refused, by reason: invalid, queue_full, stopping, memory"
        return cls(
            MetricSpec(f"{prefix}_cancelled_requests_total", Kind.COUNTER, "Requests cancelled before they were done"),
            MetricSpec(
                f"{prefix}_deadline_missed_requests_total",
                Kind.COUNTER,
                "Requests that missed their deadline, or could not meet it",
            ),
            tuple(
                MetricSpec(f"{prefix}_refused_requests_total", Kind.COUNTER, refused, reason=reason)
                for reason in REFUSALS
            ),
            MetricSpec(
                f"{prefix}_failed_requests_total", Kind.COUNTER, "Requests that ended with an error of the server"
            ),
        )

    @property
    def measures(self) -> tuple[MetricSpec, ...]:
        """All of them."""
        return (self.cancels, self.deadline_misses, *self.refusals, self.failures)

    def counter_of(self, error: BaseException) -> MetricSpec:
        """Returns the counter of requests that ended with ``error``."""
        reason = error.reason if isinstance(error, GlmImageError) else ""
        counters = {"cancelled": self.cancels, "deadline": self.deadline_misses}
        counters |= {refusal.reason: refusal for refusal in self.refusals}
        return counters.get(reason, self.failures)


class OutcomeRecorder(RequestObserver):
    """Counts the requests of a stage that do not succeed.

    Args:
        counters: the counters of the stage.
        record: records their values.
    """

    def __init__(self, counters: OutcomeCounters, record: MetricSink) -> None:
        self._counters, self._record = counters, record

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        if error is not None:
            self._record(self._counters.counter_of(error), 1)

"""The metrics of the engines: each is declared once, independently of who keeps its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from glm_image.errors import GlmImageError
from glm_image.lifecycle.context import RequestContext, RequestObserver


class Kind(Enum):
    """How the values of a metric add up."""

    COUNTER = "counter"  # their sum
    GAUGE = "gauge"  # the last value
    HISTOGRAM = "histogram"  # the number of values below each bound


@dataclass(frozen=True)
class MetricSpec:
    """A metric, named by Prometheus' rules: the unit at the end, ``_total`` for counters.

    Attributes:
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
        """Adds a value to a counter, sets a gauge to it, or has a histogram observe it so many times."""


def null_sink(metric: MetricSpec, value: float, times: int = 1, /) -> None:
    """Records nothing."""


REFUSALS: Final = ("invalid", "queue_full", "stopping", "memory")
"""The reasons for refusing a request; see ``reason`` of the error classes."""


def outcome_counters(prefix: str) -> dict[str, MetricSpec]:
    """Returns the counters of a stage's requests that did not succeed, by the ``reason`` of their errors."""

    def counter(name: str, meaning: str, reason: str = "") -> MetricSpec:
        return MetricSpec(f"{prefix}_{name}_requests_total", Kind.COUNTER, meaning, reason=reason)

    refused = f"Requests refused, by reason: {', '.join(REFUSALS)}"
    return {
        "cancelled": counter("cancelled", "Requests cancelled before they were done"),
        "deadline": counter("deadline_missed", "Requests that missed their deadline, or could not meet it"),
        **{reason: counter("refused", refused, reason) for reason in REFUSALS},
        GlmImageError.reason: counter("failed", "Requests that ended with an error of the server"),
    }


class OutcomeRecorder(RequestObserver):
    """Counts the requests of a stage that do not succeed, in its ``outcome_counters``."""

    def __init__(self, counters: Mapping[str, MetricSpec], record: MetricSink) -> None:
        self._counters, self._record = counters, record

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        if error is not None:
            failure = error if isinstance(error, GlmImageError) else GlmImageError
            self._record(self._counters[failure.reason], 1)

"""The metrics of the engines: each is declared once, independently of who keeps its values."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from glm_image.errors import GlmImageError
from glm_image.lifecycle.context import NANOSECONDS, RequestContext, RequestObserver
from glm_image.request.stages import Stage


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
        reason, outcome, stage, label: the labels that distinguish metrics of one name; "" = no such label.
    """

    name: str
    kind: Kind
    meaning: str
    bounds: tuple[float, ...] = ()
    reason: str = ""
    outcome: str = ""
    stage: str = ""
    label: str = ""

    @property
    def labels(self) -> dict[str, str]:
        values = {"reason": self.reason, "outcome": self.outcome, "stage": self.stage, "label": self.label}
        return {name: value for name, value in values.items() if value}


class MetricSink(Protocol):
    """Records values. Engines call it from their own threads, so it returns immediately and raises nothing."""

    def __call__(self, metric: MetricSpec, value: float, times: int = 1, /) -> None:
        """Adds a value to a counter, sets a gauge to it, or has a histogram observe it so many times."""


def null_sink(metric: MetricSpec, value: float, times: int = 1, /) -> None:
    """Records nothing."""


REFUSALS: Final = ("invalid", "content", "safety_check", "signing", "queue_full", "stopping", "memory")
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


LATENCY_BOUNDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

OUTCOMES: Final = ("ok", "refused", "cancelled", "deadline", "failed")


@dataclass(frozen=True)
class LatencyHistograms:
    """The latency histograms of a model: of whole requests by outcome, and of each stage by stage and outcome."""

    requests: Mapping[str, MetricSpec]
    stages: Mapping[tuple[Stage, str], MetricSpec]

    @classmethod
    def of(cls, prefix: str, meaning: str, stages: Iterable[Stage]) -> LatencyHistograms:
        """Declares them; ``meaning`` is that of a request's duration."""
        outcomes = f", by outcome: {', '.join(OUTCOMES)}"

        def histogram(name: str, text: str, outcome: str, stage: str = "") -> MetricSpec:
            full = f"{prefix}_{name}_seconds"
            return MetricSpec(full, Kind.HISTOGRAM, text + outcomes, LATENCY_BOUNDS, outcome=outcome, stage=stage)

        return cls(
            {outcome: histogram("request", meaning, outcome) for outcome in OUTCOMES},
            {
                (stage, outcome): histogram("stage", "Time a request spent in a stage", outcome, stage.value)
                for stage in stages
                for outcome in OUTCOMES
            },
        )

    def all(self) -> tuple[MetricSpec, ...]:
        return (*self.requests.values(), *self.stages.values())


class LatencyRecorder(RequestObserver):
    """Records how long the requests of a model took, from their arrival at the server and in each stage."""

    def __init__(self, histograms: LatencyHistograms, record: MetricSink) -> None:
        self._histograms, self._record = histograms, record

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        outcome = outcome_of(error)
        seconds = max(0, time.monotonic_ns() - context.received_ns) / NANOSECONDS
        self._record(self._histograms.requests[outcome], seconds)
        for stage, spent in list(context.seconds.items()):
            histogram = self._histograms.stages.get((stage, outcome))
            if histogram is not None:
                self._record(histogram, spent)


def outcome_of(error: BaseException | None) -> str:
    """Returns one of ``OUTCOMES`` for the error that ended a request, or None."""
    if error is None:
        return "ok"
    reason = error.reason if isinstance(error, GlmImageError) else GlmImageError.reason
    if reason in REFUSALS:
        return "refused"
    return reason if reason in OUTCOMES else "failed"


class OutcomeRecorder(RequestObserver):
    """Counts the requests of a stage that do not succeed, in its ``outcome_counters``."""

    def __init__(self, counters: Mapping[str, MetricSpec], record: MetricSink) -> None:
        self._counters, self._record = counters, record

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        if error is not None:
            failure = error if isinstance(error, GlmImageError) else GlmImageError
            self._record(self._counters[failure.reason], 1)

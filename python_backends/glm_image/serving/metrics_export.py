"""The engines' metrics as metrics of Triton, on its metrics port."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final

import triton_python_backend_utils as pb_utils

from glm_image.config.instance import Instance
from glm_image.telemetry.metrics import Kind, MetricSpec
from glm_image.telemetry.request_log import LOST_LINES

logger = logging.getLogger(__name__)

Value = tuple[MetricSpec, float, int]

RESTARTS: Final = MetricSpec(
    "glm_image_restarts_total",
    Kind.COUNTER,
    "Server restarts since serve started. Reported identically by every instance; do not sum",
)
RESTARTS_VARIABLE: Final = "GLM_IMAGE_RESTARTS"
"""The environment variable in which ``serve`` passes their number."""


class MetricsExporter:
    """An instance's metrics, labelled with its model and index; counters and gauges are 0 until a value comes.

    A metric lives in Triton's process, so every change of it is a message there and back. Engines only put values into
    a queue; a thread sends them, with those that have accumulated in between added together.
    """

    def __init__(self, metrics: Iterable[MetricSpec], instance: Instance[Any]) -> None:
        self._values: queue.SimpleQueue[Value | None] = queue.SimpleQueue()
        self._families: dict[str, Any] = {}  # a metric ends with its family
        self._metrics: dict[MetricSpec, Any] = {}
        labels = {"model": instance.model, "instance": str(instance.index)}
        try:
            for metric in (*metrics, LOST_LINES, RESTARTS):
                self._add(metric, labels)
            self._metrics[RESTARTS].increment(int(os.environ.get(RESTARTS_VARIABLE, "0")))
        except pb_utils.TritonModelException as error:  # a Triton may be built without metrics
            logger.warning("no metrics of this instance: %s", error)
            self._metrics.clear()
        self._thread = threading.Thread(target=self._export, name="metrics", daemon=True)
        self._thread.start()

    def _add(self, metric: MetricSpec, labels: dict[str, str]) -> None:
        if metric.name not in self._families:
            self._families[metric.name] = pb_utils.MetricFamily(
                name=metric.name,
                description=metric.meaning,
                kind=getattr(pb_utils.MetricFamily, metric.kind.name),
            )
        buckets = {"buckets": list(metric.bounds)} if metric.kind is Kind.HISTOGRAM else {}
        self._metrics[metric] = self._families[metric.name].Metric(labels={**labels, **metric.labels}, **buckets)

    def record(self, metric: MetricSpec, value: float, times: int = 1, /) -> None:
        self._values.put((metric, value, times))

    def close(self) -> None:
        """Exports the values recorded so far; later ones are dropped."""
        self._values.put(None)
        self._thread.join()
        self._metrics.clear()
        self._families.clear()

    def _export(self) -> None:
        ended = False
        while not ended:
            values = [self._values.get()]
            while not self._values.empty():
                values.append(self._values.get())
            ended = None in values
            try:
                for metric, value, times in merged(value for value in values if value is not None):
                    self._set(metric, value, times)
            except pb_utils.TritonModelException:
                logger.exception("metrics are lost")

    def _set(self, metric: MetricSpec, value: float, times: int) -> None:
        exported = self._metrics.get(metric)
        if exported is None:
            return
        if metric.kind is Kind.COUNTER:
            exported.increment(value)
        elif metric.kind is Kind.GAUGE:
            exported.set(value)
        else:
            for _ in range(times):
                exported.observe(value)


def merged(values: Iterable[Value]) -> Iterator[Value]:
    """Combines values: the sum of counters, the last value of gauges, all values of histograms."""
    last: dict[MetricSpec, float] = {}
    for metric, value, times in values:
        if metric.kind is Kind.HISTOGRAM:
            yield metric, value, times
        else:
            last[metric] = value + (last.get(metric, 0.0) if metric.kind is Kind.COUNTER else 0.0)
    yield from ((metric, value, 1) for metric, value in last.items())

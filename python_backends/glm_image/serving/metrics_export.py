"""The engines' measures as metrics of Triton, on its metrics port beside its own."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import triton_python_backend_utils as pb_utils

from glm_image.config.instance import Instance
from glm_image.telemetry.metrics import Kind, MetricSpec

logger = logging.getLogger(__name__)

Value = tuple[MetricSpec, float, int]

RESTARTS = MetricSpec(
    "glm_image_restarts_total", Kind.COUNTER, "Times that serve has started the server again; as every instance has it"
)
RESTARTS_SO_FAR = "GLM_IMAGE_RESTARTS"
"""The variable of the environment that tells of them."""


class MetricsExporter:
    """An instance's metrics, labelled with its model and index.

    A metric lives in Triton's process, so every change is a message there and back. Engines only put values into a
    queue; a thread hands them on, with what has piled up meanwhile added together.

    Args:
        measures: what is measured; counters and gauges are 0 until a value comes.
        instance: whose.
    """

    def __init__(self, measures: Iterable[MetricSpec], instance: Instance[Any]) -> None:
        self._values: queue.SimpleQueue[Value | None] = queue.SimpleQueue()
        self._families: dict[str, Any] = {}  # a family lost is a metric lost
        self._metrics: dict[MetricSpec, Any] = {}
        labels = {"model": instance.model, "instance": str(instance.index)}
        try:
            for measure in (*measures, RESTARTS):
                self._add(measure, labels)
            self._metrics[RESTARTS].increment(int(os.environ.get(RESTARTS_SO_FAR, "0")))
        except pb_utils.TritonModelException as error:  # a Triton may be built without metrics
            logger.warning("no metrics of this instance: %s", error)
            self._metrics.clear()
        self._thread = threading.Thread(target=self._forward_result, name="metrics", daemon=True)
        self._thread.start()

    def _add(self, measure: MetricSpec, labels: dict[str, str]) -> None:
        if measure.name not in self._families:
            self._families[measure.name] = pb_utils.MetricFamily(
                name=measure.name,
                description=measure.meaning,
                kind=getattr(pb_utils.MetricFamily, measure.kind.name),
            )
        if measure.reason:
            labels = {**labels, "reason": measure.reason}
        buckets = {"buckets": list(measure.bounds)} if measure.kind is Kind.HISTOGRAM else {}
        self._metrics[measure] = self._families[measure.name].Metric(labels=labels, **buckets)

    def record(self, measure: MetricSpec, value: float, times: int = 1, /) -> None:
        """Takes a value; see ``glm_image.telemetry.metrics.MetricSink``."""
        self._values.put((measure, value, times))

    def close(self) -> None:
        """Hands on what has come so far and ends; what comes later is dropped."""
        self._values.put(None)
        self._thread.join()
        self._metrics.clear()
        self._families.clear()

    def _forward_result(self) -> None:
        ended = False
        while not ended:
            values = [self._values.get()]
            while not self._values.empty():
                values.append(self._values.get())
            ended = None in values
            try:
                for measure, value, times in merged(value for value in values if value is not None):
                    self._set(measure, value, times)
            except pb_utils.TritonModelException:
                logger.exception("metrics are lost")

    def _set(self, measure: MetricSpec, value: float, times: int) -> None:
        metric = self._metrics.get(measure)
        if metric is None:
            return
        if measure.kind is Kind.COUNTER:
            metric.increment(value)
        elif measure.kind is Kind.GAUGE:
            metric.set(value)
        else:
            for _ in range(times):
                metric.observe(value)


def merged(values: Iterable[Value]) -> Iterator[Value]:
    """Returns as few values as say the same: counters summed, the last of gauges, all of histograms."""
    last: dict[MetricSpec, float] = {}
    for measure, value, times in values:
        if measure.kind is Kind.HISTOGRAM:
            yield measure, value, times
        else:
            last[measure] = value + (last.get(measure, 0.0) if measure.kind is Kind.COUNTER else 0.0)
    yield from ((measure, value, 1) for measure, value in last.items())

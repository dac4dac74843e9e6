"""The metrics of the AR."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from glm_image.request.stages import AR_STAGES
from glm_image.safety.checks import verdict_counters
from glm_image.telemetry.metrics import Kind, LatencyHistograms, MetricSink, MetricSpec, outcome_counters

RUNNING: Final = MetricSpec("glm_image_ar_running_sequences", Kind.GAUGE, "Sequences in a slot, one per image")
WAITING: Final = MetricSpec("glm_image_ar_waiting_sequences", Kind.GAUGE, "Sequences waiting for a slot, one per image")
OCCUPANCY: Final = MetricSpec("glm_image_ar_slot_occupancy_ratio", Kind.GAUGE, "Running sequences over slots, 0 to 1")
TOKENS: Final = MetricSpec(
    "glm_image_ar_tokens_total", Kind.COUNTER, "Image tokens sampled, including previews, excluding prompts"
)
STEP_SECONDS: Final = MetricSpec(
    "glm_image_ar_step_seconds",
    Kind.HISTOGRAM,
    "Duration of a decode step of all slots, on the host's clock",
    (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
ACCEPTED_TOKENS: Final = MetricSpec(
    "glm_image_ar_accepted_tokens",
    Kind.HISTOGRAM,
    "Tokens that a step of Jacobi decoding added to a sequence; nothing without `speculation`",
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
)
PREFILL_SECONDS: Final = MetricSpec(
    "glm_image_ar_prefill_seconds",
    Kind.HISTOGRAM,
    "Duration of a sequence's prefill; the first of a request includes encoding its source images",
    (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
QUEUE_SECONDS: Final = MetricSpec(
    "glm_image_ar_queue_seconds",
    Kind.HISTOGRAM,
    "Time a request waited for its first slot",
    (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
KV_CACHE_BYTES: Final = MetricSpec(
    "glm_image_ar_kv_cache_bytes", Kind.GAUGE, "Memory of the KV cache of all slots, allocated at load"
)

PROMPT_CHECKS: Final = verdict_counters("glm_image_ar", "prompt")

AR_OUTCOMES: Final = outcome_counters("glm_image_ar")

AR_LATENCIES: Final = LatencyHistograms.of(
    "glm_image_ar", "Time from a request's arrival to its tokens or its error", AR_STAGES
)

AR_METRICS: Final = (
    *(RUNNING, WAITING, OCCUPANCY, TOKENS, STEP_SECONDS, ACCEPTED_TOKENS),
    *(PREFILL_SECONDS, QUEUE_SECONDS, KV_CACHE_BYTES),
    *PROMPT_CHECKS.values(),
    *AR_OUTCOMES.values(),
    *AR_LATENCIES.all(),
)


class LoadGauges:
    """Records how many sequences run and wait: whenever ``count`` changes, in the order of the changes."""

    def __init__(self, record: MetricSink, slots: int, count: Callable[[], tuple[int, int]]) -> None:
        self._record, self._slots, self._count = record, slots, count
        self._lock = threading.Lock()
        self._recorded = (0, 0)

    def update(self) -> None:
        with self._lock:
            load = running, waiting = self._count()
            if load == self._recorded:
                return
            self._recorded = load
            self._record(RUNNING, running)
            self._record(OCCUPANCY, running / self._slots)
            self._record(WAITING, waiting)

"""What the first stage measures."""

from __future__ import annotations

from typing import Final

from glm_image.telemetry.metrics import Kind, MetricSpec, OutcomeCounters

RUNNING: Final = MetricSpec("glm_image_ar_running_sequences", Kind.GAUGE, "Sequences in a slot, one an image")
WAITING: Final = MetricSpec(
    "glm_image_ar_waiting_sequences", Kind.GAUGE, "Sequences that wait for a slot, one an image"
)
OCCUPANCY: Final = MetricSpec("glm_image_ar_slot_occupancy_ratio", Kind.GAUGE, "Running sequences over slots, 0 to 1")
TOKENS: Final = MetricSpec(
    "glm_image_ar_tokens_total", Kind.COUNTER, "Image tokens drawn, those of previews included, prompts not"
)
STEP_SECONDS: Final = MetricSpec(
    "glm_image_ar_step_seconds",
    Kind.HISTOGRAM,
    "Seconds of a decode step of all slots, by the host's clock",
    (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
PREFILL_SECONDS: Final = MetricSpec(
    "glm_image_ar_prefill_seconds",
    Kind.HISTOGRAM,
    "Seconds in which a sequence's prompt was read, and before the first of a request its source images",
    (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
QUEUE_SECONDS: Final = MetricSpec(
    "glm_image_ar_queue_seconds",
    Kind.HISTOGRAM,
    "Seconds that a request waited for its first slot",
    (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
KV_CACHE_BYTES: Final = MetricSpec(
    "glm_image_ar_kv_cache_bytes", Kind.GAUGE, "Memory of the keys and values of all slots, set aside at load"
)

AR_OUTCOMES: Final = OutcomeCounters.of("glm_image_ar")

AR_METRICS: Final = (
    *(RUNNING, WAITING, OCCUPANCY, TOKENS, STEP_SECONDS, PREFILL_SECONDS, QUEUE_SECONDS, KV_CACHE_BYTES),
    *AR_OUTCOMES.measures,
)

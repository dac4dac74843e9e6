"""The metrics of the DiT."""

from __future__ import annotations

from typing import Final

from glm_image.provenance.writer import LABELLED_IMAGES
from glm_image.request.stages import AR_STAGES, STAGE_ORDER
from glm_image.safety.checks import verdict_counters
from glm_image.telemetry.metrics import Kind, LatencyHistograms, MetricSpec, outcome_counters

STEP_SECONDS: Final = MetricSpec(
    "glm_image_dit_step_seconds",
    Kind.HISTOGRAM,
    "Seconds of a denoising step, with both branches of guidance",
    (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
CACHED_STEPS: Final = MetricSpec(
    "glm_image_dit_cached_steps_total",
    Kind.COUNTER,
    "Denoising steps whose middle blocks were skipped in all branches of guidance",
)
QUEUE_SECONDS: Final = MetricSpec(
    "glm_image_dit_queue_seconds",
    Kind.HISTOGRAM,
    "Seconds between a request's end at the AR and its start at the DiT",
    (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
VAE_SECONDS: Final = MetricSpec(
    "glm_image_dit_vae_seconds",
    Kind.HISTOGRAM,
    "Seconds to decode an image's latents to pixels on the host",
    (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0),
)
ENCODE_SECONDS: Final = MetricSpec(
    "glm_image_dit_encode_seconds",
    Kind.HISTOGRAM,
    "Seconds to encode an image as PNG, JPEG or WebP; raw images are not encoded",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
PREVIEWS: Final = MetricSpec("glm_image_dit_previews_total", Kind.COUNTER, "Previews rendered for streams")
DROPPED_PREVIEWS: Final = MetricSpec(
    "glm_image_dit_dropped_previews_total",
    Kind.COUNTER,
    "Previews not rendered: requests used the device, or the stream had ended",
)
REPLACED_PREVIEW_TOKENS: Final = MetricSpec(
    "glm_image_dit_replaced_preview_tokens_total",
    Kind.COUNTER,
    "Tokens of previews beyond the codebook, each rendered as its nearest neighbour in the grid",
)
IMAGES: Final = MetricSpec("glm_image_dit_images_total", Kind.COUNTER, "Images finished")
PEAK_MEMORY: Final = MetricSpec(
    "glm_image_dit_peak_memory_bytes",
    Kind.GAUGE,
    "Peak memory of the instance: of tensors on an accelerator, of the whole process on the CPU",
)

PROMPT_CHECKS: Final = verdict_counters("glm_image_dit", "prompt")
IMAGE_CHECKS: Final = verdict_counters("glm_image_dit", "image")

DIT_OUTCOMES: Final = outcome_counters("glm_image_dit")

DIT_LATENCIES: Final = LatencyHistograms.of(
    "glm_image_dit",
    "Time from a request's arrival at the first stage to its images or its error",
    [stage for stage in STAGE_ORDER if stage not in AR_STAGES],
)

DIT_METRICS: Final = (
    *(STEP_SECONDS, QUEUE_SECONDS, CACHED_STEPS, VAE_SECONDS, ENCODE_SECONDS, IMAGES, PREVIEWS, DROPPED_PREVIEWS),
    *(REPLACED_PREVIEW_TOKENS, PEAK_MEMORY),
    *LABELLED_IMAGES.values(),
    *PROMPT_CHECKS.values(),
    *IMAGE_CHECKS.values(),
    *DIT_OUTCOMES.values(),
    *DIT_LATENCIES.all(),
)

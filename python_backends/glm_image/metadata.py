"""What is told about a request beside its pictures: JSON objects for people and programs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from glm_image import __version__
from glm_image.checkpoint import Checkpoint
from glm_image.job import NANOSECONDS, Job
from glm_image.request import PaintRequest

STAGES = ("ar_queue", "prefill", "decode", "dit_queue", "condition", "denoise", "vae", "encode")
"""The parts of a request's time, in the order of its way."""


def ar_metadata(job: Job, tokens: Mapping[str, int]) -> dict[str, Any]:
    """Returns what the first stage tells the second about a request."""
    return {"tokens": dict(tokens), "seconds": dict(job.seconds), "finished_ns": time.monotonic_ns()}


def queued_seconds(metadata: Mapping[str, Any]) -> float:
    """Returns how long ago the first stage finished; both stages read the machine's monotonic clock."""
    finished = metadata.get("finished_ns")
    return max(0.0, (time.monotonic_ns() - finished) / NANOSECONDS) if isinstance(finished, int) else 0.0


def request_metadata(checkpoint: Checkpoint, job: Job, request: PaintRequest) -> dict[str, Any]:
    """Returns the ``metadata`` output of a finished request."""
    first_stage = request.ar_metadata.get("seconds")
    seconds = {**(first_stage if isinstance(first_stage, Mapping) else {}), **job.seconds}
    tokens = request.ar_metadata.get("tokens")
    return {
        "version": __version__,
        "seeds": list(request.seeds),
        "width": request.requested.width,
        "height": request.requested.height,
        "generated_width": request.generated.width,
        "generated_height": request.generated.height,
        "steps": request.num_inference_steps,
        "cached_steps": [0] * len(request.seeds),
        "tokens": tokens if isinstance(tokens, Mapping) else {"image": request.grid.tokens},
        "seconds": {stage: round(float(seconds.get(stage, 0.0)), 6) for stage in STAGES},
        "model": {"name": checkpoint.name, "revision": checkpoint.revision},
    }

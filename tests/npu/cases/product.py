"""Both stages on the stand-in, against the CPU, which tests/parity holds equal to diffusers and transformers.

Run by ``tests/npu/test_standin.py``. An NPU draws other random numbers than a CPU, so the noise of both is drawn here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm_image.ar.settings import ArSettings
from glm_image.ar.slot_sequence import SlotSequence
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.metadata import ar_metadata
from glm_image.pipeline import LocalPipeline, LocalSettings, paint_request
from glm_image.request.parameters import GenerationParameters

CHECKPOINT = Path(__file__).resolve().parents[3] / "checkpoints" / "tiny"
PROMPT = "a red circle that says 'NEWS'"
STEPS = 10  # enough for the step to be captured


@pytest.fixture(autouse=True)
def noise_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(sequence: Any, noise: torch.Tensor, until: int) -> None:
        for index in range(sequence.drawn, min(until, sequence.total)):
            generator = torch.Generator().manual_seed(sequence.generator.initial_seed() + index)
            row = torch.empty(noise.shape[1]).exponential_(generator=generator)
            noise[index % len(noise)].copy_(row)
            sequence.drawn = index + 1

    monkeypatch.setattr(SlotSequence, "draw_noise", draw)


def generate(device: str, dtype: str, quantization: str = "none") -> Any:
    settings = LocalSettings(
        ar=ArSettings(dtype=dtype, max_sequence_tokens=512, quantization=quantization, max_num_seqs=2),
        dit=DitSettings(dtype=dtype, parallel="auto", warmup_sizes=(), quantization=quantization),
    )
    with LocalPipeline(CHECKPOINT, device, settings) as pipeline:
        parameters = GenerationParameters(prompt=PROMPT, height=64, width=96, num_inference_steps=STEPS, seed=7)
        resolved, context = pipeline.resolve(parameters), RequestContext()
        prior = pipeline.prior(resolved, context)
        return prior.prior_token_ids, pipeline.paint(
            paint_request(
                resolved,
                prior,
                ar_metadata(context, prior.tokens, prior.steps, resolved.sampling, pipeline.ar.token_settings),
            )
        )


def worst(one: Any, other: Any) -> int:
    return int(np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max())


@pytest.mark.parametrize(
    ("dtype", "quantization", "most"), [("float32", "none", 1), ("bfloat16", "none", 3), ("bfloat16", "int8", 8)]
)
def test_the_product_has_the_tokens_and_the_pixels_of_the_cpu(dtype: str, quantization: str, most: int) -> None:
    cpu_tokens, expected = generate("cpu", dtype, quantization)
    tokens, image = generate("npu:0", dtype, quantization)
    assert np.array_equal(tokens, cpu_tokens)
    assert worst(image, expected) <= most

"""Both stages on the stand-in, against the CPU, which tests/parity holds equal to diffusers and transformers.

Run by ``tests/npu/test_standin.py``. An NPU draws other random numbers than a CPU, so the noise of both is drawn here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm_image.ar.executor import NOISE_BLOCK, Executor
from glm_image.ar.settings import ArSettings
from glm_image.dit.settings import DitSettings
from glm_image.pipeline import LocalPipeline, LocalSettings
from glm_image.request.parameters import GenerationParameters

CHECKPOINT = Path(__file__).resolve().parents[3] / "checkpoints" / "tiny"
PROMPT = "a red circle that says 'NEWS'"
STEPS = 10  # enough for the step to be captured


@pytest.fixture(autouse=True)
def noise_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refill(executor: Any, slot: int, sequence: Any) -> None:
        generator = torch.Generator().manual_seed(sequence.generator.initial_seed() + sequence.sampled)
        noise = torch.empty_like(executor._state.noise[slot], device="cpu").exponential_(generator=generator)
        executor._state.noise[slot].copy_(noise)

    assert NOISE_BLOCK > 0
    monkeypatch.setattr(Executor, "_refill_noise", refill)


def generate(device: str, dtype: str, quantization: str = "none") -> Any:
    settings = LocalSettings(
        ar=ArSettings(dtype=dtype, max_sequence_tokens=512, quantization=quantization, max_num_seqs=2),
        dit=DitSettings(dtype=dtype, parallel="auto", warmup_sizes=(), quantization=quantization),
    )
    with LocalPipeline(CHECKPOINT, device, settings) as pipeline:
        parameters = GenerationParameters(
            prompt=PROMPT, height=64, width=96, num_inference_steps=STEPS, seed=7
        )
        tokens = pipeline.prior(pipeline.resolve(parameters)).prior_token_ids
        return tokens, pipeline.generate(parameters)


def worst(one: Any, other: Any) -> int:
    return int(np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max())


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1), ("bfloat16", 3)])
def test_the_product_has_the_tokens_and_the_pixels_of_the_cpu(dtype: str, most: int) -> None:
    cpu_tokens, expected = generate("cpu", dtype)
    tokens, image = generate("npu:0", dtype)
    same = int((tokens == cpu_tokens).sum()), tokens.size
    if dtype == "float32":
        assert np.array_equal(tokens, cpu_tokens), same
    print("tokens", same, "worst", worst(image, expected))
    assert worst(image, expected) <= most

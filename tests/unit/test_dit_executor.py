from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import GlmImageTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.cpu import CpuDevice
from glm_image.dit.commands import Drop, Prepare, Step
from glm_image.dit.executor import FEWEST_STEPS_TO_CAPTURE
from glm_image.dit.select_blocks import select_blocks
from glm_image.pipeline import LocalPipeline
from glm_image.request.geometry import Grid

GRID = Grid(1, 2)


class CpuWithAnother(CpuDevice):
    """A CPU on which diffusers is to attend in another way."""

    attention_backend = "_native_math"


def test_what_attends_is_named_as_in_diffusers(checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers sets it for all transformers of the process.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry.get_active_backend()[0])
    config = Checkpoint.open(checkpoint_folder).config("transformer")
    transformer = GlmImageTransformer2DModel.from_config(config | {"num_layers": 1})
    cpu = torch.device("cpu")
    assert select_blocks(transformer, CpuDevice(cpu)).attention_backend == "native"
    assert select_blocks(transformer, CpuWithAnother(cpu)).attention_backend == "_native_math"


@pytest.mark.parametrize("steps_taken", [0, 1, 3])
def test_a_dropped_picture_is_gone_at_once(pipeline: LocalPipeline, steps_taken: int) -> None:
    """A captured step that waits for the garbage collector may be freed in the middle of another's capture."""
    executor = pipeline.dit.executor
    tokens = np.zeros(GRID.tokens, dtype=np.int32)
    executor.run(Prepare(-5, "a", "", tokens, GRID, FEWEST_STEPS_TO_CAPTURE + 1, 1.5, seed=0))
    for _ in range(steps_taken):
        executor.run(Step(-5))
    latents = weakref.ref(executor._pictures[-5].latents)
    gc.disable()
    try:
        executor.run(Drop(-5))
        assert latents() is None
    finally:
        gc.enable()

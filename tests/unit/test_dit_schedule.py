from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.glm_image import pipeline_glm_image
from hypothesis import given
from hypothesis import strategies as st

from glm_image.dit.schedule import schedule
from tiny_checkpoint_configs import scheduler_config

CPU = torch.device("cpu")


def reference_schedule(scheduler: Any, steps: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    times = np.linspace(1000, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    shift = pipeline_glm_image.calculate_shift((height // 8) * (width // 8) // 4, 256, 0.25, 0.75)
    scheduler = copy.deepcopy(scheduler)
    timesteps, _ = pipeline_glm_image.retrieve_timesteps(scheduler, steps, CPU, times, times / 1000, mu=shift)
    return timesteps - 1, scheduler.sigmas


@given(steps=st.integers(1, 200), th=st.integers(1, 64), tw=st.integers(1, 64))
def test_schedules_equal_the_references(reference: Any, steps: int, th: int, tw: int) -> None:
    made = schedule(scheduler_config(), steps, 4 * th * tw, CPU)
    timesteps, sigmas = reference_schedule(reference.scheduler, steps, 32 * th, 32 * tw)
    assert torch.equal(made.timesteps, timesteps)
    assert torch.equal(made.sigmas, sigmas)


def test_schedule_follows_its_formula() -> None:
    made = schedule(scheduler_config(), 50, 64 * 64, CPU)
    times = torch.tensor([int(time) for time in np.linspace(1000, 1, 51)[:-1]])
    sigmas = times / 1000
    shift = 0.25 + 0.75 * (64 * 64 / 256) ** 0.5
    assert made.timesteps.tolist() == (times - 1).tolist()
    assert torch.allclose(made.sigmas[:-1], shift / (shift + 1 / sigmas - 1), rtol=1e-6)
    assert made.sigmas[-1] == 0
    assert made.sigmas.dtype == made.timesteps.dtype == torch.float32


def test_shift_comes_from_the_checkpoint() -> None:
    own = scheduler_config() | {"base_image_seq_len": 64, "base_shift": 0.5, "max_shift": 1.5}
    made, usual = (schedule(config, 4, 256, CPU) for config in (own, scheduler_config()))
    shift = 0.5 + 1.5 * 2
    assert made.sigmas[1].item() == pytest.approx(shift / (shift + 1 / 0.75 - 1), rel=1e-3)
    assert (made.sigmas[1:-1] > usual.sigmas[1:-1]).all()

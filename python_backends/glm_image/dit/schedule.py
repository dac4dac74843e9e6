"""Noise levels of the denoising steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The steps of one picture.

    Attributes:
        timesteps: fp32 [steps], what the transformer is told: the unshifted time, less one.
        sigmas: fp32 [steps + 1], what the Euler steps use: shifted by the picture's size, ending at 0.
    """

    timesteps: Tensor
    sigmas: Tensor


def schedule(config: Mapping[str, Any], steps: int, tokens: int, device: torch.device) -> Schedule:
    """Works out a picture's schedule as diffusers' ``pipeline_glm_image.py`` does.

    Args:
        config: the checkpoint's ``scheduler_config.json``.
        steps: how many.
        tokens: image tokens of the transformer, H/16 * W/16: larger pictures stay noisy for longer.
        device: where the tensors go.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    train_timesteps = scheduler.config.num_train_timesteps
    times = np.linspace(train_timesteps, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    root = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    shift = root * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
    scheduler.set_timesteps(steps, device=device, timesteps=times, sigmas=times / train_timesteps, mu=shift)
    return Schedule(timesteps=scheduler.timesteps - 1, sigmas=scheduler.sigmas)

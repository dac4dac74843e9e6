"""Noise levels of the denoising steps, and the step between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The steps of one image.

    Attributes:
        timesteps: fp32 [steps], the transformer's input: the unshifted time, less one.
        sigmas: fp32 [steps + 1], the noise levels: shifted by the image's size, ending at 0.
    """

    timesteps: Tensor
    sigmas: Tensor


def schedule(config: Mapping[str, Any], steps: int, tokens: int, device: torch.device) -> Schedule:
    """Computes an image's schedule as diffusers' ``pipeline_glm_image.py`` does, from ``scheduler_config.json``.

    ``tokens`` are the image tokens of the transformer, H/16 * W/16: larger images stay noisy for longer.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    train_timesteps = scheduler.config.num_train_timesteps
    times = np.linspace(train_timesteps, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    root = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    shift = root * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
    scheduler.set_timesteps(steps, device=device, timesteps=times, sigmas=times / train_timesteps, mu=shift)
    return Schedule(timesteps=scheduler.timesteps - 1, sigmas=scheduler.sigmas)


def check_schedule(config: Mapping[str, Any]) -> None:
    """Computes the shortest and a longer schedule of a checkpoint.

    Raises:
        ValueError: a time or a noise level is not finite, or the noise levels do not fall to 0.
    """
    for steps in (1, 20):
        found = schedule(config, steps, 4096, torch.device("cpu"))
        if not torch.isfinite(found.timesteps).all() or not torch.isfinite(found.sigmas).all():
            raise ValueError("the schedule has values that are infinite or not a number")
        if found.sigmas[-1] != 0 or (found.sigmas.diff() >= 0).any():
            raise ValueError("the noise levels of the schedule do not fall to 0")


def euler_step(
    latents: Tensor, velocities: Sequence[Tensor], guidance_scale: float, step: Tensor, sigmas: Tensor
) -> Tensor:
    """Takes one Euler step of the flow (Lipman et al., 2023) from fp32 latents [1, channels, height, width].

    ``velocities`` are the conditional branch's and, with guidance, the unconditional branch's, as ``latents``. ``step``
    is int64 [1], on the device so that a captured step can count; ``sigmas`` is fp32 [steps + 1].
    """
    velocity, *rest = velocities
    for unconditional in rest:  # classifier-free guidance (Ho and Salimans, 2022)
        velocity = unconditional + guidance_scale * (velocity - unconditional)
    change = sigmas.index_select(0, step + 1) - sigmas.index_select(0, step)
    return latents + change * velocity

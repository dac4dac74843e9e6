"""The device's side of the second stage: does what it is told, decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.devices import Device, Mark
from glm_image.dit.blocks import Blocks
from glm_image.dit.conditioning import Conditioner, Conditioning
from glm_image.dit.forward import denoise_step
from glm_image.dit.schedule import Schedule, schedule
from glm_image.dit.vae import Vae
from glm_image.geometry import Grid

STEPS_AHEAD = 2
"""Steps that may wait in the device's queue: enough to keep it busy, few enough to stop within a step or two."""

LATENTS_PER_TOKEN = 4
IMAGE_TOKENS_PER_TOKEN = 4


@dataclass(frozen=True)
class Prepare:
    """Draw a picture's noise and prepare its conditions."""

    picture: int
    prompt: str
    negative_prompt: str
    prior_token_ids: NDArray[np.int32]
    grid: Grid
    num_inference_steps: int
    guidance_scale: float
    seed: int


@dataclass(frozen=True)
class Step:
    """Take a picture's next denoising step."""

    picture: int


@dataclass(frozen=True)
class Decode:
    """Make pixels of a picture's latents, and forget it."""

    picture: int


@dataclass(frozen=True)
class Drop:
    """Forget a picture."""

    picture: int


Command = Prepare | Step | Decode | Drop


@dataclass
class _Picture:
    latents: Tensor
    conditioning: Conditioning | None
    schedule: Schedule
    step: int = 0


class Executor:
    """Paints pictures a command at a time; their latents stay on the device.

    ``Decode`` may run in another thread than the rest.

    Args:
        transformer: diffusers' ``GlmImageTransformer2DModel`` on ``device``.
        blocks: what runs its blocks.
        conditioner: prepares conditions.
        vae: makes pixels.
        scheduler_config: the checkpoint's ``scheduler_config.json``.
        device: where all of them are.
    """

    def __init__(
        self,
        transformer: Any,
        blocks: Blocks,
        conditioner: Conditioner,
        vae: Vae,
        scheduler_config: Mapping[str, Any],
        device: Device,
    ) -> None:
        self._transformer = transformer
        self._blocks = blocks
        self._conditioner = conditioner
        self._vae = vae
        self._scheduler_config = scheduler_config
        self._device = device
        self._pictures: dict[int, _Picture] = {}
        self._queue: deque[Mark] = deque()

    def run(self, command: Command) -> NDArray[np.uint8] | None:
        """Runs one command; ``Decode`` returns the picture, uint8 [height, width, 3]."""
        self._device.bind()
        with torch.inference_mode():
            if isinstance(command, Prepare):
                self._prepare(command)
            elif isinstance(command, Step):
                self._step(self._pictures[command.picture])
            elif isinstance(command, Decode):
                return self._vae.decode(self._pictures.pop(command.picture).latents)
            else:
                self._pictures.pop(command.picture, None)
            return None

    def _prepare(self, command: Prepare) -> None:
        place, grid = self._device.torch_device, command.grid
        steps = schedule(
            self._scheduler_config, command.num_inference_steps, grid.tokens * IMAGE_TOKENS_PER_TOKEN, place
        )
        shape = (
            1,
            self._transformer.config.in_channels,
            grid.height * LATENTS_PER_TOKEN,
            grid.width * LATENTS_PER_TOKEN,
        )
        # Drawn on the host in the model's dtype, as the reference does: the same noise on every kind of device.
        generator = torch.Generator().manual_seed(command.seed)
        noise = torch.randn(shape, generator=generator, dtype=self._transformer.proj_out.weight.dtype)
        conditioning = self._conditioner.prepare(
            command.prompt,
            command.negative_prompt,
            command.prior_token_ids,
            grid,
            command.guidance_scale,
            steps,
        )
        self._pictures[command.picture] = _Picture(noise.to(place), conditioning, steps)
        self._device.mark().wait()

    def _step(self, picture: _Picture) -> None:
        assert picture.conditioning is not None
        picture.latents = denoise_step(
            self._transformer,
            self._blocks,
            picture.latents,
            picture.conditioning,
            picture.step,
            picture.schedule.sigmas,
        )
        picture.step += 1
        done = picture.step == len(picture.schedule.timesteps)
        if done:
            picture.conditioning = None
        self._queue.append(self._device.mark())
        while len(self._queue) > (0 if done else STEPS_AHEAD):
            self._queue.popleft().wait()

"""The denoising steps of one image, computed in full, and their capture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from glm_image.devices.base import Device
from glm_image.dit.conditioning import Conditioning
from glm_image.dit.model import DitModel
from glm_image.dit.schedule import euler_step

MIN_STEPS_TO_CAPTURE = 8
"""Capturing a step costs the host about as much as taking one, and saves time on each later one."""

Compute = Callable[[], None]
"""Work on tensors that stay where they are; it never waits for the device."""


@dataclass(frozen=True)
class ImageState:
    """The tensors of an image that is denoised. Steps update them in place, so that a captured step can count.

    Attributes:
        conditioning: of this rank's share.
        latents: fp32 [1, channels, height, width].
        step: int64 [1], steps taken.
        sigmas: noise levels, fp32 [steps + 1].
    """

    conditioning: Conditioning
    latents: Tensor
    step: Tensor
    sigmas: Tensor

    @property
    def time(self) -> Tensor:
        """The embedding of the next step's time, [1, time width]."""
        return self.conditioning.times.index_select(0, self.step)

    def advance(self, velocities: list[Tensor]) -> None:
        """Takes a step along the velocities of the branches, fp32 each and of the latents' shape."""
        scale = self.conditioning.guidance_scale
        self.latents.copy_(euler_step(self.latents, velocities, scale, self.step, self.sigmas))
        self.step.add_(1)


class StepCapture:
    """Captures the steps of one image in one memory pool; too few steps for capture to pay run eagerly."""

    def __init__(self, device: Device, steps: int) -> None:
        self._device, self._is_on = device, steps >= MIN_STEPS_TO_CAPTURE
        self._pool = device.graph_pool() if self._is_on else None

    def __call__(self, compute: Compute) -> Compute:
        return CapturedStep(compute, self._device, self._pool) if self._is_on else compute


class CapturedStep:
    """Runs eagerly the first time, as a warm-up, and captured from the second time on."""

    def __init__(self, compute: Compute, device: Device, pool: object | None) -> None:
        self._compute, self._device, self._pool = compute, device, pool
        self._runs = 0

    def __call__(self) -> None:
        if self._runs == 1:
            self._compute = self._device.capture(self._compute, warm=True, pool=self._pool)
        self._runs += 1
        self._compute()


class ExactStep:
    """Takes the next step of an image, computing all blocks."""

    def __init__(self, model: DitModel, state: ImageState, capture: StepCapture) -> None:
        # Not a method of this object: as the capture holds it, the object and the graphs would form a reference cycle,
        # and the graphs of a dropped image would live until some later garbage collection.
        self._compute = capture(partial(_denoise, model, state))

    def __call__(self) -> bool:
        """Takes the step; returns whether the cache skipped it, which is never."""
        self._compute()
        return False


def _denoise(model: DitModel, state: ImageState) -> None:
    conditioning, time = state.conditioning, state.time
    sequences = model.project_in(state.latents, conditioning.branches)
    tokens = model.run_blocks(range(len(model.blocks)), sequences, time, conditioning)
    images = [image for image, _ in tokens]
    state.advance(model.project_out(images, time, tuple(state.latents.shape), guided=conditioning.guided))

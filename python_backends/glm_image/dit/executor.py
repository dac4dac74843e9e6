"""Runs the DiT's commands on one device; the scheduler decides which and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.devices.base import Device
from glm_image.devices.oom import OomReport, run_or_oom
from glm_image.dit.cache import CacheSettings
from glm_image.dit.cached_step import CachedStep, cached_step
from glm_image.dit.commands import (
    Decode,
    Drop,
    Estimate,
    ForgetSources,
    ImageCommand,
    Prepare,
    ReadSources,
    Step,
)
from glm_image.dit.conditioning import Conditioner
from glm_image.dit.memory import source_bytes
from glm_image.dit.model import DitModel
from glm_image.dit.schedule import schedule
from glm_image.dit.source_kv import SourceCache
from glm_image.dit.step import ExactStep, ImageState, StepCapture
from glm_image.dit.vae import Vae
from glm_image.errors import DeviceMemoryError, InvalidInputError
from glm_image.parallel.commands import Command, R
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid

LATENTS_PER_TOKEN = 4
IMAGE_TOKENS_PER_TOKEN = 4

OPERATIONS: Final = {
    Prepare: "the conditioning",
    Step: "a denoising step",
    Estimate: "a latent preview",
    Decode: "the VAE decode",
}
"""Names of the commands in an out-of-memory error."""


@dataclass
class _Image:
    """An image that is denoised.

    Attributes:
        latents: fp32, updated in place.
        sigmas: its noise levels, fp32 [steps + 1].
        step: takes a step; None when all are taken, so that captured steps are freed before the image is decoded.
        previous: the latents before the latest step, if that was ``for_estimate``.
    """

    grid: Grid
    latents: Tensor
    sigmas: NDArray[np.float32]
    step: ExactStep | CachedStep | None
    steps_taken: int = 0
    previous: Tensor | None = None


class Executor:
    """Denoises and decodes images, a command at a time; their latents stay on the device.

    ``Decode`` may run in another thread than the other commands. ``scheduler_config`` is the checkpoint's
    ``scheduler_config.json``.

    Attributes:
        cache: the residual cache of images prepared from now on; None = exact steps.
    """

    def __init__(
        self,
        model: DitModel,
        conditioner: Conditioner,
        vae: Vae,
        scheduler_config: Mapping[str, Any],
        device: Device,
        cache: CacheSettings | None = None,
    ) -> None:
        self._model = model
        self._conditioner = conditioner
        self._vae = vae
        self._scheduler_config = scheduler_config
        self._device = device
        self.cache = cache
        self._images: dict[int, _Image] = {}
        self._sources: dict[int, SourceCache] = {}

    @property
    def attention_backend(self) -> str:
        """The attention of the transformer's blocks, by its name in diffusers' attention dispatch."""
        return self._model.blocks.attention_backend

    def run(self, command: Command[R]) -> R:
        """Runs one command; an image whose command runs out of memory is dropped, except by an estimate of it.

        Raises:
            DeviceMemoryError: an allocation failed.
            InvalidInputError: the sources need more memory than the device has.
        """
        self._device.set_current()
        try:
            result: R = run_or_oom(self._device, partial(self._dispatch, command), partial(self._oom_report, command))
        except DeviceMemoryError:
            if isinstance(command, ImageCommand) and not isinstance(command, Estimate):
                self._drop(command.image)
                self._device.release_unused()
            raise
        return result

    @torch.inference_mode()
    def _dispatch(self, command: Command[Any]) -> Any:  # noqa: PLR0911 - one for each command
        match command:
            case Prepare():
                return self._prepare(command)
            case Step():
                return self._take_step(self._images[command.image], command.for_estimate)
            case Estimate():
                return self._estimate(self._images[command.image])
            case Decode():
                return self._decode(command.image)
            case Drop():
                return self._drop(command.image)
            case ReadSources():
                return self._read_sources(command)
            case ForgetSources():
                self._sources.pop(command.request, None)
                return None
            case _:
                raise TypeError(f"{command!r} is no command of the DiT")

    def _oom_report(self, command: Command[Any]) -> OomReport:
        in_use = f"{len(self._images)} images and the sources of {len(self._sources)} requests in memory"
        operation = OPERATIONS.get(type(command), "the release of memory")
        if isinstance(command, ReadSources):
            operation = f"the reading of {command.megapixels:.1f} megapixels of source images"
        if not isinstance(command, ImageCommand):
            return OomReport(operation, in_use, "their number or size")
        image = self._images.get(command.image)
        grid = command.grid if isinstance(command, Prepare) else image.grid if image else None
        size = f" of {grid.width * PIXELS_PER_TOKEN} x {grid.height * PIXELS_PER_TOKEN}" if grid else ""
        return OomReport(f"{operation} of an image{size}", in_use, "height x width, or the source images")

    def close(self) -> None:
        """Waits for running work and drops all images: communicators in captured steps can't be ended before."""
        try:
            self._device.set_current()
            self._device.record_event().synchronize()
        finally:
            self._images.clear()

    def _read_sources(self, command: ReadSources) -> None:
        model, place, sources = self._model, self._device.torch_device, command.sources
        config, ranks = model.transformer.config, model.parallel.ranks
        tokens = [source.grid.tokens * IMAGE_TOKENS_PER_TOKEN for source in sources]
        needed = source_bytes(config, sum(tokens), model.dtype.itemsize)
        free = ranks.world.all_reduce_min(self._device.memory().free, place)
        if needed > free:
            raise InvalidInputError.of(
                "image",
                f"{command.megapixels:.1f} megapixels in all, which take {needed / 1e9:.1f} GB",
                f"what fits the {free / 1e9:.1f} GB that are free on {self._device}",
            )
        # All of them before the cache is allocated, which then gets the memory that the VAE worked in.
        prepared = [
            self._conditioner.prepare_source(self._vae.encode(source.pixels), source.token_ids, source.grid)
            for source in sources
        ]
        cache = SourceCache(config, tokens, place, model.dtype, ranks)
        model.read_sources(prepared, cache)
        self._device.record_event().synchronize()
        self._sources[command.request] = cache

    def _prepare(self, command: Prepare) -> NDArray[np.float32]:
        place, grid, steps = self._device.torch_device, command.grid, command.num_inference_steps
        timetable = schedule(self._scheduler_config, steps, grid.tokens * IMAGE_TOKENS_PER_TOKEN, place)
        sources = None if command.sources_of is None else self._sources[command.sources_of]
        conditioning = self._conditioner.prepare(command, timetable, sources)
        state = ImageState(
            conditioning=self._model.parallel.shard_conditioning(conditioning),
            latents=self._noise(command.seed, grid).to(place, torch.float32),
            step=torch.zeros(1, device=place, dtype=torch.int64),
            sigmas=timetable.sigmas,
        )
        step: ExactStep | CachedStep
        capture = StepCapture(self._device, steps)
        if self.cache is None:
            step = ExactStep(self._model, state, capture)
        else:
            step = cached_step(self._model, state, self.cache, steps, len(sources.tokens) if sources else 0, capture)
        sigmas: NDArray[np.float32] = timetable.sigmas.float().cpu().numpy()
        self._images[command.image] = _Image(grid, state.latents, sigmas, step)
        self._device.record_event().synchronize()
        return sigmas

    def _noise(self, seed: int, grid: Grid) -> Tensor:
        # Sampled on the host in the model's dtype, as the reference does: the same noise on every kind of device.
        channels = self._model.transformer.config.in_channels
        shape = (1, channels, grid.height * LATENTS_PER_TOKEN, grid.width * LATENTS_PER_TOKEN)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=self._model.dtype)

    def _take_step(self, image: _Image, for_estimate: bool) -> bool:
        if image.step is None:
            raise RuntimeError(f"all {image.steps_taken} steps of the image are taken")
        image.previous = image.latents.clone() if for_estimate else None
        is_cached = image.step()
        image.steps_taken += 1
        # No step is enqueued ahead: enqueued work cannot be taken back, and a cancelled request frees the device within
        # one step.
        self._device.record_event().synchronize()
        if image.steps_taken == len(image.sigmas) - 1:
            image.step = None
        return is_cached

    def _estimate(self, image: _Image) -> NDArray[np.uint8]:
        if image.previous is None:
            raise RuntimeError("the latest step was not for_estimate")
        before, after = (float(sigma) for sigma in image.sigmas[image.steps_taken - 1 : image.steps_taken + 1])
        return self._vae.preview((before * image.latents - after * image.previous) / (before - after))

    def _decode(self, number: int) -> NDArray[np.uint8]:
        pixels = self._vae.decode(self._images[number].latents)
        del self._images[number]
        return pixels

    def _drop(self, number: int) -> None:
        image = self._images.pop(number, None)
        if image is not None and image.step is not None:
            self._device.record_event().synchronize()  # a captured step's memory must not be reused before it has run
            image.step = None


class Follower:
    """The executor of a rank other than the first, which alone decodes latents."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def run(self, command: Command[Any]) -> None:
        self._executor.run(Drop(command.image) if isinstance(command, Decode) else command)

    def close(self) -> None:
        self._executor.close()

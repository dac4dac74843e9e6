"""Runs the DiT's commands on one device; the scheduler decides which and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    EncodeSource,
    Estimate,
    ForgetSources,
    ImageCommand,
    Prepare,
    ReadSource,
    ReserveSources,
    SourceCommand,
    Step,
)
from glm_image.dit.conditioning import Conditioner, SourceConditioning
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
class _Sources:
    """The source images of a request.

    Attributes:
        grids: of all of them.
        encoded: what is read; empty when all are read.
        cache: their keys and values; None until the first is read.
    """

    grids: tuple[Grid, ...]
    encoded: list[SourceConditioning] = field(default_factory=list)
    cache: SourceCache | None = None


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
        self._sources: dict[int, _Sources] = {}

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
            if isinstance(command, SourceCommand):
                self._sources.pop(command.request, None)
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
            case ReserveSources():
                return self._reserve_sources(command)
            case EncodeSource():
                return self._encode_source(command)
            case ReadSource():
                return self._read_source(self._sources[command.request], command.index)
            case ForgetSources():
                self._sources.pop(command.request, None)
                return None
            case _:
                raise TypeError(f"{command!r} is no command of the DiT")

    def _oom_report(self, command: Command[Any]) -> OomReport:
        in_use = f"{len(self._images)} images and the sources of {len(self._sources)} requests in memory"
        operation = OPERATIONS.get(type(command), "the release of memory")
        if isinstance(command, SourceCommand):
            grids = self._sources[command.request].grids
            megapixels = ReserveSources(command.request, grids).megapixels
            operation = f"the reading of {megapixels:.1f} megapixels of source images"
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

    def _reserve_sources(self, command: ReserveSources) -> bool:
        model = self._model
        tokens = sum(grid.tokens for grid in command.grids) * IMAGE_TOKENS_PER_TOKEN
        needed = source_bytes(model.transformer.config, tokens, model.dtype.itemsize)
        free = model.parallel.ranks.world.all_reduce_min(self._device.memory().free, self._device.torch_device)
        if needed > free:
            if self._sources:
                return False
            raise InvalidInputError.of(
                "image",
                f"{command.megapixels:.1f} megapixels in all, which take {needed / 1e9:.1f} GB",
                f"what fits the {free / 1e9:.1f} GB that are free on {self._device}",
            )
        self._sources[command.request] = _Sources(command.grids)
        return True

    def _encode_source(self, command: EncodeSource) -> None:
        # All of them before the cache is allocated, which then gets the memory that the VAE worked in.
        source = command.source
        latents = self._vae.encode(source.pixels)
        self._sources[command.request].encoded.append(
            self._conditioner.prepare_source(latents, source.token_ids, source.grid)
        )
        self._device.record_event().synchronize()

    def _read_source(self, sources: _Sources, index: int) -> None:
        model = self._model
        if sources.cache is None:
            tokens = [grid.tokens * IMAGE_TOKENS_PER_TOKEN for grid in sources.grids]
            config, ranks = model.transformer.config, model.parallel.ranks
            sources.cache = SourceCache(config, tokens, self._device.torch_device, model.dtype, ranks)
        model.read_source(sources.encoded[index], sources.cache, index)
        if index == len(sources.grids) - 1:
            sources.encoded.clear()
        self._device.record_event().synchronize()

    def _prepare(self, command: Prepare) -> NDArray[np.float32]:
        place, grid, steps = self._device.torch_device, command.grid, command.num_inference_steps
        timetable = schedule(self._scheduler_config, steps, grid.tokens * IMAGE_TOKENS_PER_TOKEN, place)
        sources = None if command.sources_of is None else self._sources[command.sources_of].cache
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

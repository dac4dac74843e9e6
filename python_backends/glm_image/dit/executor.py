"""The device's side of the second stage: does what it is told, decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.devices.base import Device
from glm_image.devices.oom import OomReport, run_or_oom
from glm_image.dit.blocks import Blocks
from glm_image.dit.cache import CacheSettings
from glm_image.dit.cached_step import CachedDenoiser, DbCacheStep, Repeat
from glm_image.dit.commands import (
    Command,
    Decode,
    Drop,
    Estimate,
    ForgetSources,
    NameAttention,
    Prepare,
    ReadSources,
    Result,
    Step,
)
from glm_image.dit.conditioning import Conditioner, Conditioning
from glm_image.dit.forward import denoise_step, read_sources
from glm_image.dit.parallel_context import SINGLE_RANK, ParallelContext
from glm_image.dit.schedule import schedule
from glm_image.dit.source_kv import SourceCache
from glm_image.dit.vae import Vae
from glm_image.errors import InvalidInputError
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid
from glm_image.request.source_images import SourcePicture

FEWEST_STEPS_TO_CAPTURE = 8
"""Capturing a step costs the host about what taking one does, and pays with each later one."""

LATENTS_PER_TOKEN = 4
IMAGE_TOKENS_PER_TOKEN = 4


@dataclass
class _Picture:
    """A picture being painted.

    Attributes:
        grid: its size.
        latents: fp32, updated in place.
        levels: its noise levels, fp32 [steps + 1].
        advance: takes a step, and returns whether the cache skipped it; None when all are taken.
        taken: steps taken so far.
        before: the latents before the latest step that was ``for_estimate``.
    """

    grid: Grid
    latents: Tensor
    levels: NDArray[np.float32]
    advance: Callable[[], bool | None] | None
    taken: int = 0
    before: Tensor | None = None


class _CapturedAfterWarmup:
    """Runs a step as it is the first time, which warms it up, and captured from the second on."""

    def __init__(self, capture: Callable[[Callable[[], None]], Callable[[], None]], step: Callable[[], None]) -> None:
        self._capture, self._step = capture, step
        self._runs = 0

    def __call__(self) -> None:
        if self._runs == 1:
            self._step = self._capture(self._step)
        self._runs += 1
        self._step()


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
        cache: see the attribute.
        sharing: how this rank shares the work with others.

    Attributes:
        cache: what the steps of pictures prepared from now on may reuse; None = nothing.
    """

    def __init__(
        self,
        transformer: Any,
        blocks: Blocks,
        conditioner: Conditioner,
        vae: Vae,
        scheduler_config: Mapping[str, Any],
        device: Device,
        cache: CacheSettings | None = None,
        sharing: ParallelContext = SINGLE_RANK,
    ) -> None:
        self._sharing = sharing
        self._transformer = transformer
        self._blocks = blocks
        self._conditioner = conditioner
        self._vae = vae
        self._scheduler_config = scheduler_config
        self._device = device
        self.cache = cache
        self._pictures: dict[int, _Picture] = {}
        self._sources: dict[int, SourceCache] = {}
        self._is_short = False

    def run(self, command: Command) -> Result:
        """Runs one command.

        Raises:
            DeviceMemoryError: out of memory. An image must still be dropped.
        """
        self._device.set_current()
        return run_or_oom(self._device, lambda: self._obey(command), lambda: self._oom_report(command))

    @torch.inference_mode()
    def _obey(self, command: Command) -> Result:
        if isinstance(command, Prepare):
            return self._prepare(command)
        if isinstance(command, Step):
            return self._step(self._pictures[command.picture], command.for_estimate)
        if isinstance(command, Estimate):
            return self._estimate(self._pictures[command.picture])
        if isinstance(command, Decode):
            pixels = self._vae.decode(self._pictures[command.picture].latents)
            del self._pictures[command.picture]
            return pixels
        if isinstance(command, NameAttention):
            return self._blocks.attention_backend
        if isinstance(command, ReadSources):
            self._sources[command.request] = self._read_sources(command.sources)
        elif isinstance(command, ForgetSources):
            self._sources.pop(command.request, None)
        else:
            self._drop(self._pictures.pop(command.picture, None))
        return None

    def _oom_report(self, command: Command) -> OomReport:
        self._is_short = True
        in_use = f"{len(self._pictures)} images and the sources of {len(self._sources)} requests in memory"
        if isinstance(command, ReadSources):
            pixels = sum(source.pixels.size for source in command.sources) / 3e6
            return OomReport(f"the reading of {pixels:.1f} megapixels of source images", in_use, "their number or size")
        names = {
            Prepare: "the conditioning",
            Step: "a denoising step",
            Estimate: "a latent preview",
            Decode: "the VAE decode",
        }
        operation = names.get(type(command), "the release")
        return OomReport(
            f"{operation} of an image{self._size_of(command)}", in_use, "height x width, or the source images"
        )

    def _size_of(self, command: Command) -> str:
        of_none = ReadSources | ForgetSources | NameAttention
        picture = None if isinstance(command, of_none) else self._pictures.get(command.picture)
        grid = command.grid if isinstance(command, Prepare) else picture and picture.grid
        return f" of {grid.width * PIXELS_PER_TOKEN} x {grid.height * PIXELS_PER_TOKEN}" if grid else ""

    def close(self) -> None:
        """Waits for what is under way and drops all pictures: communicators in captured steps can't be ended before."""
        try:
            self._device.set_current()
            self._device.record_event().synchronize()
        finally:
            self._pictures.clear()

    def _read_sources(self, sources: tuple[SourcePicture, ...]) -> SourceCache:
        dtype, config = self._transformer.proj_out.weight.dtype, self._transformer.config
        tokens = [source.grid.tokens * IMAGE_TOKENS_PER_TOKEN for source in sources]
        ranks, place = self._sharing.ranks, self._device.torch_device
        needed = SourceCache.bytes_needed(config, sum(tokens), dtype)
        free = ranks.world.all_reduce_min(self._device.memory().free, place)
        if needed > free:
            raise InvalidInputError.of(
                "image",
                f"{sum(source.pixels.size for source in sources) / 3e6:.1f} megapixels in all, "
                f"which take {needed / 1e9:.1f} GB",
                f"what fits the {free / 1e9:.1f} GB that are free on {self._device}",
            )
        # All of them before the cache is made, which then gets the memory that the VAE worked in.
        prepared = [
            self._conditioner.prepare_source(self._vae.encode(source.pixels), source.token_ids, source.grid)
            for source in sources
        ]
        cache = SourceCache(config, tokens, place, dtype, ranks)
        read_sources(self._transformer, self._blocks, prepared, cache, self._sharing)
        self._device.record_event().synchronize()
        return cache

    def _prepare(self, command: Prepare) -> NDArray[np.float32]:
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
        whole = self._conditioner.prepare(
            command.prompt,
            command.negative_prompt,
            command.prior_token_ids,
            grid,
            command.guidance_scale,
            steps,
            None if command.sources_of is None else self._sources[command.sources_of],
        )
        conditioning = self._sharing.own_conditioning(whole)
        latents, step = noise.to(place, torch.float32), torch.zeros(1, device=place, dtype=torch.int64)
        # Of tensors, not of the picture: a cycle would keep a dropped picture's graph until some later collection.
        advance: Callable[[], bool | None]
        repeat = self._repeat(command.num_inference_steps)
        if self.cache is None:
            advance = repeat(partial(self._advance, latents, step, conditioning, steps.sigmas))
        else:
            tensors = (conditioning, latents, step, steps.sigmas)
            halves = DbCacheStep(self._transformer, self._blocks, self.cache, *tensors, self._sharing)
            sources = len(whole.sources.tokens) if whole.sources else 0
            advance = CachedDenoiser(halves, self.cache, command.num_inference_steps, sources, repeat)
        levels: NDArray[np.float32] = steps.sigmas.float().cpu().numpy()
        self._pictures[command.picture] = _Picture(grid, latents, levels, advance)
        self._device.record_event().synchronize()
        return levels

    def _repeat(self, times: int) -> Repeat:
        if times < FEWEST_STEPS_TO_CAPTURE:
            return lambda step: step
        return partial(_CapturedAfterWarmup, partial(self._device.capture, warm=True, pool=self._device.graph_pool()))

    def _advance(self, latents: Tensor, step: Tensor, conditioning: Conditioning, sigmas: Tensor) -> None:
        parts = (self._transformer, self._blocks)
        latents.copy_(denoise_step(*parts, latents, conditioning, step, sigmas, self._sharing))
        step.add_(1)

    def _step(self, picture: _Picture, for_estimate: bool) -> bool:
        assert picture.advance is not None
        picture.before = picture.latents.clone() if for_estimate else None
        skipped = bool(picture.advance())
        picture.taken += 1
        # None is enqueued ahead: what is enqueued cannot be taken back, and who cancels gets the device within a step.
        self._device.record_event().synchronize()
        if picture.taken == len(picture.levels) - 1:
            picture.advance = None
        return skipped

    def _estimate(self, picture: _Picture) -> NDArray[np.uint8]:
        assert picture.before is not None
        last, now = (float(level) for level in picture.levels[picture.taken - 1 : picture.taken + 1])
        return self._vae.sketch((last * picture.latents - now * picture.before) / (last - now))

    def _drop(self, picture: _Picture | None) -> None:
        if picture is not None and picture.advance is not None:
            self._device.record_event().synchronize()  # a captured step's memory is in use until then
            picture.advance = None
        if self._is_short:
            self._is_short = False
            self._device.release_unused()


class Follower:
    """The executor of a rank other than the first, which alone makes pixels of latents."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def run(self, command: Command) -> None:
        """Runs one command."""
        self._executor.run(Drop(command.picture) if isinstance(command, Decode) else command)

    def close(self) -> None:
        """Ends the executor."""
        self._executor.close()

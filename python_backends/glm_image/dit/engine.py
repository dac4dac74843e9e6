"""The second stage, put together: tokens become pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from numpy.typing import NDArray
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from glm_image import geometry, images
from glm_image.checkpoint import Checkpoint, fill
from glm_image.devices import Device, check_budget
from glm_image.dit.blocks import best_blocks
from glm_image.dit.cache import CacheSettings
from glm_image.dit.conditioning import Conditioner
from glm_image.dit.executor import IMAGE_TOKENS_PER_TOKEN, Executor
from glm_image.dit.measures import ENCODE_SECONDS, IMAGES, PEAK_MEMORY
from glm_image.dit.quantized import quantize_blocks, weight_bytes
from glm_image.dit.scheduler import Run, Scheduler
from glm_image.dit.sources import SourceCache
from glm_image.dit.vae import Vae
from glm_image.errors import ConfigurationError
from glm_image.geometry import Grid, Size
from glm_image.job import Job
from glm_image.measures import Record, keep_nothing
from glm_image.request import PaintRequest
from glm_image.sources import SourcePicture


@dataclass(frozen=True)
class DitSettings:
    """How the second stage runs.

    Attributes:
        dtype: None = the device's default.
        memory_utilization: share of the device's memory this stage may use.
        warmup_sizes: sizes painted once at load, so that the first request of such a size is as fast as later ones.
        cache: when steps may reuse what earlier ones computed; None = never.
        quantization: ``int8`` or ``fp8`` for the products of the transformer's blocks, or ``none``.
        vae_tiling: whether the VAE does large pictures in tiles: ``off``, ``on``, or ``auto``, which is on where the
            largest picture would not fit in one piece.
        largest_side: of a picture, in pixels.
    """

    dtype: torch.dtype | None = None
    memory_utilization: float = 0.9
    warmup_sizes: tuple[Size, ...] = ()
    cache: CacheSettings | None = None
    quantization: str = "none"
    vae_tiling: str = "off"
    largest_side: int = 2048


@dataclass(frozen=True)
class DitResult:
    """Finished pictures.

    Attributes:
        pixels: uint8 [n, height, width, 3], cropped to the size asked for.
        encoded: their files; empty when raw pixels were asked for.
    """

    pixels: NDArray[np.uint8]
    encoded: list[bytes]


class DitEngine:
    """The transformer, the glyph encoder and the VAE on one device.

    Args:
        checkpoint: where they come from.
        device: where they run.
        settings: how.
        record: takes what ``dit.measures`` names.
        watched: wraps what runs commands on the device, to see one that never ends.

    Attributes:
        codebook_size: prior token ids are below it.
        source_rule: how source images are sized.
        executor: what runs on the device.

    Raises:
        CheckpointError: a tensor is missing or has a wrong shape.
        ConfigurationError: the device is too small or can't multiply what ``quantization`` names, or the cache does not
            fit the transformer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        settings: DitSettings,
        record: Record = keep_nothing,
        watched: Callable[[Run], Run] = lambda run: run,
    ) -> None:
        device.bind()
        self._device, self._record = device, record
        dtype = settings.dtype or device.default_dtype
        modules = _empty_modules(checkpoint)
        if settings.cache is not None:
            _check(settings.cache, len(modules["transformer"].transformer_blocks))
        if settings.quantization != "none":
            quantize_blocks(modules["transformer"], settings.quantization, device, dtype)
        weights = {name: weight_bytes(module, dtype) for name, module in modules.items()}
        memory = device.memory()
        check_budget(
            "glm_dit",
            fixed={f"the weights of {name}": size for name, size in weights.items()},
            scaled={},
            memory=memory,
            utilization=settings.memory_utilization,
            device=str(device),
        )
        left = int(memory.total * settings.memory_utilization) - sum(weights.values())
        tiling = settings.vae_tiling == "on" or (
            settings.vae_tiling == "auto" and left < _bytes_at_work(modules, settings.largest_side, dtype)
        )
        for component, module in modules.items():
            fill(module, checkpoint.tensors(component, device.torch_device, dtype))
        transformer, autoencoder, glyph_encoder = modules.values()
        self.codebook_size: int = transformer.config.prior_vq_quantizer_codebook_size
        self.source_rule = checkpoint.source_rule
        glyph_tokenizer = ByT5Tokenizer.from_pretrained(checkpoint.path("tokenizer"))
        self.executor = Executor(
            transformer,
            best_blocks(transformer, device),
            Conditioner(transformer, glyph_encoder, glyph_tokenizer),
            Vae(autoencoder, device, tiling=tiling),
            checkpoint.config("scheduler"),
            device,
            settings.cache,
        )
        self._scheduler = Scheduler(watched(self.executor.run), record)
        for size in settings.warmup_sizes:
            self._warm_up(geometry.target_grid(geometry.generated_size(size)))
        record(PEAK_MEMORY, device.peak_memory())

    def _warm_up(self, grid: Grid) -> None:
        tokens = np.zeros((1, grid.tokens), dtype=np.int32)
        size = geometry.painted_size(grid)
        request = PaintRequest("", tokens, grid, size, seeds=(0,), num_inference_steps=2)
        scheduler = Scheduler(self.executor.run)  # one of its own, whose steps nobody counts
        scheduler.decode(Job(), scheduler.denoise(Job(), request))

    def denoise(self, job: Job, request: PaintRequest, sources: tuple[SourcePicture, ...] = ()) -> list[int]:
        """Denoises a request's pictures, blocking until the device is free for the next; see ``finish``.

        Args:
            job: looked at between steps.
            request: what to paint.
            sources: its source images, as ``PaintRequest.read_sources`` gives them.

        Raises:
            CancelledError: the job was cancelled.
            DeadlineExceededError: its time ran out.
            InvalidInputError: the sources need more memory than the device has.
        """
        return self._scheduler.denoise(job, request, sources)

    def finish(self, job: Job, request: PaintRequest, pictures: list[int]) -> DitResult:
        """Makes pixels and files of denoised pictures; may run in a thread while others are denoised."""
        decoded = self._scheduler.decode(job, pictures)
        pixels = np.stack([images.crop(picture, request.requested) for picture in decoded])
        encoded: list[bytes] = []
        with job.timed("encode"):
            if request.output_format != "raw":
                encoded = [self._encode(picture, request.output_format) for picture in pixels]
        self._record(IMAGES, len(pixels))
        self._record(PEAK_MEMORY, self._device.peak_memory())
        return DitResult(pixels, encoded)

    def preview(self, job: Job, request: PaintRequest) -> Future[NDArray[np.uint8]]:
        """Has the first picture of a request painted beside others, uint8 [height, width, 3]; see ``dit.previews``.

        Raises:
            UnavailableError: there are too many, too much is painted, or the engine is closed.
        """
        return self._scheduler.previews.submit(job, request)

    def close(self) -> None:
        """Ends the previews that wait."""
        self._scheduler.previews.close()

    def _encode(self, picture: NDArray[np.uint8], output_format: str) -> bytes:
        started = time.monotonic()
        encoded = images.encode(picture, output_format)
        self._record(ENCODE_SECONDS, time.monotonic() - started)
        return encoded


def _empty_modules(checkpoint: Checkpoint) -> dict[str, Any]:
    with torch.device("meta"):
        return {
            "transformer": GlmImageTransformer2DModel.from_config(checkpoint.config("transformer")),
            "vae": AutoencoderKL.from_config(checkpoint.config("vae")),
            "text_encoder": T5EncoderModel(T5Config(**checkpoint.config("text_encoder"))),
        }


def _check(cache: CacheSettings, blocks: int) -> None:
    cache.check(blocks)
    try:
        # Seconds, which the first picture need not wait for.
        from glm_image.dit import cache_decisions  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigurationError(f"cache is 'cache_dit', but the package cache-dit cannot be used: {error}") from error


def _bytes_at_work(modules: Mapping[str, Any], side: int, dtype: torch.dtype) -> int:
    """The memory of a step of a square picture, and of decoding another in one piece meanwhile."""
    size = geometry.generated_size(Size(side, side))
    tokens = geometry.target_grid(size).tokens * IMAGE_TOKENS_PER_TOKEN
    branches = 2
    step = SourceCache.bytes_at_work(modules["transformer"].config, tokens, dtype) * branches
    return step + Vae.bytes_needed(modules["vae"].config, size, dtype)

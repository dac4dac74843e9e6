"""The second stage, put together: tokens become pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from numpy.typing import NDArray
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from glm_image import geometry, images
from glm_image.checkpoint import Checkpoint, fill
from glm_image.devices import Device
from glm_image.dit.blocks import best_blocks
from glm_image.dit.conditioning import Conditioner
from glm_image.dit.executor import Executor
from glm_image.dit.scheduler import Scheduler
from glm_image.dit.vae import Vae
from glm_image.geometry import Grid, Size
from glm_image.job import Job
from glm_image.request import PaintRequest
from glm_image.sources import SourcePicture


@dataclass(frozen=True)
class DitSettings:
    """How the second stage runs.

    Attributes:
        dtype: None = the device's default.
        warmup_sizes: sizes painted once at load, so that the first request of such a size is as fast as later ones.
    """

    dtype: torch.dtype | None = None
    warmup_sizes: tuple[Size, ...] = ()


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

    Attributes:
        codebook_size: prior token ids are below it.
        source_rule: how source images are sized.
        executor: what runs on the device.

    Raises:
        CheckpointError: a tensor is missing or has a wrong shape.
    """

    def __init__(self, checkpoint: Checkpoint, device: Device, settings: DitSettings) -> None:
        device.bind()
        dtype = settings.dtype or device.default_dtype

        def load(component: str, build: Any, config: Any) -> Any:
            with torch.device("meta"):
                module = build(config)
            fill(module, checkpoint.tensors(component, device.torch_device, dtype))
            return module

        transformer = load("transformer", GlmImageTransformer2DModel.from_config, checkpoint.config("transformer"))
        self.codebook_size: int = transformer.config.prior_vq_quantizer_codebook_size
        self.source_rule = checkpoint.source_rule
        autoencoder = load("vae", AutoencoderKL.from_config, checkpoint.config("vae"))
        glyph_encoder = load("text_encoder", T5EncoderModel, T5Config(**checkpoint.config("text_encoder")))
        glyph_tokenizer = ByT5Tokenizer.from_pretrained(checkpoint.path("tokenizer"))
        self.executor = Executor(
            transformer,
            best_blocks(transformer, device),
            Conditioner(transformer, glyph_encoder, glyph_tokenizer),
            Vae(autoencoder),
            checkpoint.config("scheduler"),
            device,
        )
        self._scheduler = Scheduler(self.executor.run)
        for size in settings.warmup_sizes:
            self._warm_up(geometry.target_grid(geometry.generated_size(size)))

    def _warm_up(self, grid: Grid) -> None:
        tokens = np.zeros((1, grid.tokens), dtype=np.int32)
        size = geometry.painted_size(grid)
        request = PaintRequest("", tokens, grid, size, seeds=(0,), num_inference_steps=2)
        self.finish(Job(), request, self.denoise(Job(), request))

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
                encoded = [images.encode(picture, request.output_format) for picture in pixels]
        return DitResult(pixels, encoded)

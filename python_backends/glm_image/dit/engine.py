"""The second stage, put together: tokens become pixels."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.dit.commands import NameAttention
from glm_image.dit.loading import load_executor
from glm_image.dit.metrics import ENCODE_SECONDS, IMAGES, PEAK_MEMORY
from glm_image.dit.scheduler import Run, Scheduler
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.rank_group import NO_WORKERS, WorkerConfig, start
from glm_image.request import geometry, images
from glm_image.request.geometry import Grid
from glm_image.request.parameters import PaintRequest
from glm_image.request.source_images import SourcePicture
from glm_image.telemetry.metrics import MetricSink, null_sink


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
    """The transformer, the glyph encoder and the VAE on one device, or on several that share each step.

    Args:
        checkpoint: where they come from.
        device: where they run.
        settings: how.
        record: takes what ``dit.measures`` names.
        peers: other devices that paint together with ``device``.
        watched: wraps what runs commands on the device, to see one that never ends.

    Attributes:
        codebook_size: prior token ids are below it.
        source_rule: how source images are sized.
        executor: what runs on the devices.
        attention_backend: what attends in the transformer's blocks, by its name in diffusers' attention dispatch.

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
        record: MetricSink = null_sink,
        peers: WorkerConfig = NO_WORKERS,
        watched: Callable[[Run], Run] = lambda run: run,
    ) -> None:
        device.bind()
        self._device, self._record = device, record
        self.codebook_size: int = checkpoint.config("transformer")["prior_vq_quantizer_codebook_size"]
        self.source_rule = checkpoint.source_rule
        layout = ParallelLayout.parse(settings.parallel, 1 + len(peers.devices))
        self.executor = start(load_executor, (checkpoint, settings), device, layout, peers)
        self.attention_backend = str(self.executor.run(NameAttention()))
        self._scheduler = Scheduler(watched(self.executor.run), record)
        for size in device.warmup_sizes if settings.warmup_sizes is None else settings.warmup_sizes:
            self._warm_up(geometry.target_grid(geometry.generated_size(size)))
        record(PEAK_MEMORY, device.peak_memory())

    def _warm_up(self, grid: Grid) -> None:
        tokens = np.zeros((1, grid.tokens), dtype=np.int32)
        size = geometry.painted_size(grid)
        request = PaintRequest("", tokens, grid, size, seeds=(0,), num_inference_steps=2)
        scheduler = Scheduler(self.executor.run)  # one of its own, whose steps nobody counts
        scheduler.decode(RequestContext(), scheduler.denoise(RequestContext(), request))

    def denoise(
        self, context: RequestContext, request: PaintRequest, sources: tuple[SourcePicture, ...] = ()
    ) -> list[int]:
        """Denoises a request's pictures, blocking until the device is free for the next; see ``finish``.

        Args:
            context: looked at between steps.
            request: what to paint.
            sources: its source images, as ``PaintRequest.read_sources`` gives them.

        Raises:
            CancelledError: the job was cancelled.
            DeadlineExceededError: its time ran out.
            InvalidInputError: the sources need more memory than the device has.
        """
        return self._scheduler.denoise(context, request, sources)

    def finish(self, context: RequestContext, request: PaintRequest, pictures: list[int]) -> DitResult:
        """Makes pixels and files of denoised pictures; may run in a thread while others are denoised."""
        decoded = self._scheduler.decode(context, pictures)
        pixels = np.stack([images.crop(picture, request.requested) for picture in decoded])
        encoded: list[bytes] = []
        with context.timed("encode"):
            if request.output_format != "raw":
                encoded = [self._encode(picture, request.output_format) for picture in pixels]
        self._record(IMAGES, len(pixels))
        self._record(PEAK_MEMORY, self._device.peak_memory())
        return DitResult(pixels, encoded)

    def preview(self, context: RequestContext, request: PaintRequest) -> Future[NDArray[np.uint8]]:
        """Has the first picture of a request painted beside others, uint8 [height, width, 3]; see ``dit.previews``.

        Raises:
            UnavailableError: there are too many, too much is painted, or the engine is closed.
        """
        return self._scheduler.previews.submit(context, request)

    def close(self) -> None:
        """Ends the previews that wait, and the other ranks."""
        self._scheduler.previews.close()
        self.executor.close()

    def _encode(self, picture: NDArray[np.uint8], output_format: str) -> bytes:
        started = time.monotonic()
        encoded = images.encode(picture, output_format)
        self._record(ENCODE_SECONDS, time.monotonic() - started)
        return encoded

"""The DiT engine: prior tokens become pixels and files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.dit.compute_thread import ComputeThread
from glm_image.dit.intermediate_images import IntermediateImages
from glm_image.dit.loading import load_executor
from glm_image.dit.metrics import ENCODE_SECONDS, IMAGES, PEAK_MEMORY, REPLACED_PREVIEW_TOKENS
from glm_image.dit.previews import within_codebook
from glm_image.dit.scheduler import Scheduler
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.preview_rpc import Delivery, IntermediateImage
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.rank_group import NO_WORKERS, WorkerConfig, local_executor, start_ranks
from glm_image.parallel.worker import RankExecutor
from glm_image.provenance.settings import ProvenanceSettings
from glm_image.provenance.writer import Provenance, RequestOrigin
from glm_image.request import geometry, images
from glm_image.request.geometry import Grid
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest
from glm_image.request.stages import Stage
from glm_image.safety.checks import SafetyChecks, blurred, no_checks
from glm_image.telemetry.metrics import MetricSink, null_sink

UNFINISHED_REQUESTS = 2
"""Requests that may wait for the VAE and the encoder, their latents in the device's memory."""


@dataclass(frozen=True)
class DitResult:
    """The images of a request.

    Attributes:
        pixels: uint8 [n, height, width, 3], cropped to the requested size.
        encoded: the encoded files; empty for the output format ``raw``.
        labels: the AIGC label of each image; empty if none is configured.
        blurred: the numbers of the images that a safety check had blurred.
    """

    pixels: NDArray[np.uint8]
    encoded: list[bytes]
    labels: tuple[dict[str, str], ...] = ()
    blurred: tuple[int, ...] = ()


class DitEngine:
    """The transformer, the glyph encoder and the VAE on one device, or on several that share each step.

    Args:
        device: of rank 0.
        record: receives the metrics of ``dit.metrics``.
        workers: the devices of the other ranks.
        watched: wraps the function that runs commands, so that a watchdog can time them.
        provenance: what files say about their origin.
        safety: the checks of prompts and images.

    Attributes:
        codebook_size: prior token ids are below it.
        source_rule: how source images are sized.
        model: the checkpoint's name and revision.
        intermediate_images: checks and labels previews.
        attention_backend: the attention of the transformer's blocks, by its name in diffusers' attention dispatch.

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
        workers: WorkerConfig = NO_WORKERS,
        watched: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] = lambda run: run,
        provenance: ProvenanceSettings | None = None,
        safety: SafetyChecks | None = None,
    ) -> None:
        self._device, self._record = device, record
        self.model = {"name": checkpoint.name, "revision": checkpoint.revision}
        self._provenance = Provenance(provenance or ProvenanceSettings(), self.model, settings.pixel_settings, record)
        self._safety = safety or no_checks()
        self.intermediate_images = IntermediateImages(self._provenance, self._safety)
        self.codebook_size: int = checkpoint.config("transformer")["prior_vq_quantizer_codebook_size"]
        self.source_rule = checkpoint.source_rule
        layout = ParallelLayout.parse(settings.parallel, 1 + len(workers.devices))
        self._compute = ComputeThread(device.is_host)
        load = partial(start_ranks, load_executor, (checkpoint, settings), device, layout, workers)
        self.executor = self._compute.call(_on_device, device, load)
        self.attention_backend: str = local_executor(self.executor).attention_backend
        self._scheduler = Scheduler(self._compute.running(watched(self.executor.run)), record)
        for size in device.warmup_sizes if settings.warmup_sizes is None else settings.warmup_sizes:
            self._warm_up(geometry.target_grid(geometry.generated_size(size)))
        record(PEAK_MEMORY, device.peak_memory())
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="dit-finisher")
        self._unfinished = threading.Semaphore(UNFINISHED_REQUESTS)

    def _warm_up(self, grid: Grid) -> None:
        tokens = np.zeros((1, grid.tokens), dtype=np.int32)
        size = geometry.rendered_size(grid)
        request = PaintRequest("", tokens, grid, size, seeds=(0,), num_inference_steps=2)
        scheduler = Scheduler(self._compute.running(self.executor.run))  # records no metrics
        scheduler.decode(RequestContext(), scheduler.denoise(RequestContext(), request))

    def paint(self, context: RequestContext, request: PaintRequest, limits: Limits) -> Future[DitResult]:
        """Renders the images of a request, which it validates first.

        Blocks until all of them are denoised. Requests of several threads take turns, an image each; see
        ``dit.fair_queue``. Decoding, cropping and encoding go on in the engine's finisher thread. The future resolves
        to the images, or to the error that occurred while they were decoded or encoded.

        Raises:
            InvalidInputError: an input is not allowed, or the sources need more memory than the device has.
            CancelledError: the request was cancelled.
            DeadlineExceededError: its time ran out.
            DeviceMemoryError: the device has too little memory for it.
            ContentRefusedError: the safety hook refuses its texts.
            SafetyCheckError: the safety hook gave no verdict.
        """
        request.check(limits, self.codebook_size)
        context.is_blurred = self._safety.check_prompt(context, request)
        sources = request.read_sources(limits, self.source_rule, context.check)
        origin = self._provenance.of_request(request, limits)
        numbers = self._scheduler.denoise(context, request, sources, limits.max_source_pixels)
        self._unfinished.acquire()
        result = self._finisher.submit(self._decode_and_encode, context, origin, numbers)
        result.add_done_callback(lambda _: self._unfinished.release())
        return result

    def _decode_and_encode(self, context: RequestContext, origin: RequestOrigin, numbers: list[int]) -> DitResult:
        decoded = self._scheduler.decode(context, numbers)
        with context.timed(Stage.ENCODE):
            result = self._finished(context, origin, decoded)
        self._record(IMAGES, len(decoded))
        self._record(PEAK_MEMORY, self._device.peak_memory())
        return result

    def _finished(self, context: RequestContext, origin: RequestOrigin, decoded: NDArray[np.uint8]) -> DitResult:
        """Crops, checks, labels and encodes images, uint8 [n, height, width, 3]."""
        cropped = [images.crop(image, origin.request.requested) for image in decoded]
        blurs = [self._safety.check_image(context, image) or context.is_blurred for image in cropped]
        pixels = np.stack(
            [
                self._provenance.marked(blurred(image) if blur else image)
                for image, blur in zip(cropped, blurs, strict=True)
            ]
        )
        self._provenance.count_marked(len(pixels))
        labels = [self._provenance.label(image) for image in pixels]
        encoded: list[bytes] = []
        if origin.request.output_format != "raw":
            encoded = [
                self._encode(image, origin, index, label)
                for index, (image, label) in enumerate(zip(pixels, labels, strict=True))
            ]
        return DitResult(
            pixels,
            encoded,
            tuple(label for label in labels if label is not None),
            tuple(index for index, blur in enumerate(blurs) if blur),
        )

    def preview(self, context: RequestContext, request: PaintRequest, limits: Limits) -> Future[IntermediateImage]:
        """Renders the one image of a request when the device allows it.

        Previews run while no request is denoised, or between two denoising steps; see ``dit.previews``. Tokens beyond
        the codebook, which the AR may sample in a preview's grid as the reference does, are replaced.

        Raises:
            InvalidInputError: an input is not allowed.
            UnavailableError: too many previews wait, requests leave no time for them, or the engine is closed.
        """
        tokens, replaced = within_codebook(request.prior_token_ids, request.grid, self.codebook_size)
        if replaced:
            self._record(REPLACED_PREVIEW_TOKENS, replaced)
        request = replace(request, prior_token_ids=tokens)
        request.check(limits, self.codebook_size)
        preview: Future[IntermediateImage] = Future()

        def deliver(made: Delivery) -> None:
            if isinstance(made, Exception):
                preview.set_exception(made)
            else:
                preview.set_result(made)

        def finish(rendered: Future[NDArray[np.uint8]]) -> None:
            error = rendered.exception()
            if error is None:
                self.intermediate_images.finish(rendered.result(), deliver, request=request)
            else:
                preview.set_exception(error)

        self._scheduler.previews.submit(context, request).add_done_callback(finish)
        return preview

    def close(self) -> None:
        """Finishes the requests that are denoised, fails the previews that wait, and ends the other ranks."""
        self._finisher.shutdown(wait=True)
        self._scheduler.previews.close()
        self.intermediate_images.close()
        self.executor.close()
        self._compute.close()

    def _encode(
        self, image: NDArray[np.uint8], origin: RequestOrigin, index: int, label: dict[str, str] | None
    ) -> bytes:
        started = time.monotonic()
        encoded = self._provenance.file(image, origin, index, label)
        self._record(ENCODE_SECONDS, time.monotonic() - started)
        return encoded


def _on_device(device: Device, load: Callable[[], RankExecutor]) -> RankExecutor:
    device.set_current()
    return load()

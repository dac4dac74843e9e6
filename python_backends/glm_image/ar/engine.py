"""The AR engine: from a validated request to tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from glm_image.ar.admission import Admission
from glm_image.ar.commands import ArCommand, Encode
from glm_image.ar.config import ArConfig
from glm_image.ar.loading import load_executor
from glm_image.ar.memory import kv_cache_bytes
from glm_image.ar.metrics import KV_CACHE_BYTES
from glm_image.ar.scheduler import Scheduler
from glm_image.ar.scheduler_thread import SchedulerThread
from glm_image.ar.sequence import ArResult, Request, Sources
from glm_image.ar.settings import ArSettings, captured_rows
from glm_image.ar.speculation import HOST_ROW_COST, ROW_COST, WindowPolicy
from glm_image.ar.vision import patches_of
from glm_image.ar.warmup import warmup_commands
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.open import named_dtype
from glm_image.errors import InvalidInputError
from glm_image.lifecycle.context import RequestContext
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.rank_group import NO_WORKERS, WorkerConfig, start_ranks
from glm_image.parallel.worker import RankExecutor
from glm_image.request.geometry import Grid, PlacedGrid, Size, source_grid
from glm_image.request.parameters import ResolvedRequest, Sampling
from glm_image.request.prompts import PromptTokenizer
from glm_image.request.source_images import Source
from glm_image.telemetry.metrics import MetricSink, null_sink

__all__ = ["ArEngine", "ArResult"]

AnyRun = Callable[[ArCommand[Any]], Any]
"""``Run`` without the types of results, as wrappers see it."""


class ArEngine:
    """The decoder and the vision tower with their slots and their queue, on one device or several.

    Args:
        record: takes the metrics of ``ar.metrics``.
        workers: other devices that share the decoder with ``device``.
        watched: wraps the function that runs commands, to detect one that never returns.
        admission: decides when a free slot is filled; None = immediately.

    Attributes:
        source_rule: how source images are sized.
        executor: runs commands on the devices; the scheduler's until ``close_scheduler``.

    Raises:
        CheckpointError: a tensor is missing or has a wrong shape.
        ConfigurationError: a setting is not allowed, or the device is too small.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        settings: ArSettings,
        record: MetricSink = null_sink,
        workers: WorkerConfig = NO_WORKERS,
        watched: Callable[[AnyRun], AnyRun] = lambda run: run,
        admission: Admission | None = None,
    ) -> None:
        device.set_current()
        dtype = named_dtype(settings.dtype) or device.default_dtype
        self.config = ArConfig.read(checkpoint)
        self._settings = settings
        slots, positions = settings.max_num_seqs, settings.max_sequence_tokens
        self._tokenizer = PromptTokenizer(checkpoint.processor)
        self._image_processor = checkpoint.image_processor
        self.source_rule = checkpoint.source_rule
        layout = ParallelLayout(tp=1 + len(workers.devices))
        self.executor = _load(
            device, partial(start_ranks, load_executor, (checkpoint, settings), device, layout, workers)
        )
        record(KV_CACHE_BYTES, kv_cache_bytes(self.config, slots, positions, dtype.itemsize))
        run = watched(self.executor.run)
        rows = captured_rows(settings, is_host=device.is_host)
        row_cost = HOST_ROW_COST if device.is_host else ROW_COST
        windows = WindowPolicy(settings.speculation_window, rows, row_cost) if rows else None
        scheduler = Scheduler(run, slots, settings.max_queue, record, admission, windows)
        warmup = self._warmup_commands(device.warmup_sizes, rows)
        self._scheduler = SchedulerThread(scheduler, partial(_run_all, run, warmup))

    @property
    def token_settings(self) -> dict[str, str]:
        """The settings that change tokens."""
        return self._settings.token_settings

    @property
    def sampling(self) -> Sampling:
        """The checkpoint's default sampling."""
        return self.config.sampling

    def is_alive(self) -> bool:
        """Whether the engine's thread runs; does not return while another thread holds its lock."""
        return self._scheduler.is_alive()

    def submit(self, context: RequestContext, request: ResolvedRequest) -> Future[ArResult]:
        """Queues a request.

        Raises:
            InvalidInputError: the prompt and the image have more tokens than a slot holds.
            UnavailableError: the queue is full, or the engine is closed.
            DeadlineExceededError: the request cannot be done before its deadline.
        """
        prompt_ids, placed = self._prompt(request)
        self._check_length(request, prompt_ids, placed)
        sources = Sources(patches_of(self._image_processor, request.sources), placed) if placed else None
        # The files and the pixels are not needed any more, and are large.
        lean = replace(request, parameters=replace(request.parameters, images=None), sources=())
        return self._scheduler.submit(Request(context, tuple(prompt_ids), lean, sources=sources))

    def _prompt(self, request: ResolvedRequest) -> tuple[list[int], tuple[PlacedGrid, ...]]:
        prompt = request.parameters.prompt
        if request.sources:
            return self._tokenizer.image_to_image(prompt, request.target, [source.grid for source in request.sources])
        preview, target = request.grids
        return self._tokenizer.text_to_image(prompt, target, preview), ()

    def _check_length(self, request: ResolvedRequest, prompt_ids: list[int], placed: tuple[PlacedGrid, ...]) -> None:
        positions = self._settings.max_sequence_tokens
        most = positions - sum(grid.tokens for grid in request.grids)
        if most < 1:
            height, width = request.requested
            allowed = f"images of fewer than {positions} tokens (max_sequence_tokens)"
            raise InvalidInputError.of("height x width", f"{height} x {width}", allowed)
        if len(prompt_ids) > most:
            source_tokens = sum(grid.tokens for _, grid in placed)
            length = f"{len(prompt_ids)} tokens long" + f", {source_tokens} of them of source images" * bool(placed)
            allowed = f"at most {most} in addition to those of the image (max_sequence_tokens)"
            raise InvalidInputError.of("prompt", length, allowed)

    def _warmup_commands(self, sizes: tuple[Size, ...], rows: tuple[int, ...]) -> list[ArCommand[Any]]:
        ids = self._tokenizer.text_to_image("warm-up", Grid(1, 1), Grid(1, 1))
        sources = []
        for grid in (source_grid(size, self.source_rule) for size in sizes):
            height, width = (side * self.source_rule.patch for side in grid)
            blank = Source(np.zeros((height, width, 3), dtype=np.uint8), grid)
            sources.append(Encode(patches_of(self._image_processor, [blank]), (grid,)))
        return warmup_commands(ids, sources, self.sampling, self._settings.max_sequence_tokens, speculates=bool(rows))

    def close(self) -> None:
        self.close_scheduler()
        self.executor.close()

    def close_scheduler(self) -> None:
        """Ends all requests and stops the engine's thread; the caller may use ``executor`` from then on."""
        self._scheduler.close()


def _load(device: Device, load: Callable[[], RankExecutor]) -> RankExecutor:
    """Loads; on the host in a thread that then ends, so that only the scheduler's has ever computed."""
    if not device.is_host:
        return load()
    with ThreadPoolExecutor(1, thread_name_prefix="ar-loading") as loading:
        return loading.submit(load).result()


def _run_all(run: AnyRun, commands: list[ArCommand[Any]]) -> None:
    for command in commands:
        run(command)

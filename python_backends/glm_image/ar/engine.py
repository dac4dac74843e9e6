"""The first stage, put together: a validated request becomes tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers import GlmImageProcessor

from glm_image.ar.admission import Admission
from glm_image.ar.commands import Command, Encode
from glm_image.ar.config import ArConfig
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.loading import load_executor
from glm_image.ar.metrics import KV_CACHE_BYTES
from glm_image.ar.scheduler import Run, Scheduler
from glm_image.ar.sequence import Sources
from glm_image.ar.settings import ArSettings
from glm_image.ar.vision import patches_of
from glm_image.ar.warmup import warmup_commands
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
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


@dataclass(frozen=True)
class ArResult:
    """What the first stage hands on.

    Attributes:
        prior_token_ids: int32 [pictures, tokens of the picture's grid], before upsampling.
        tokens: how many of each kind: prompt, source, preview, image.
        source_token_ids: int32 [tokens of all source images].
        source_grids: the grid of each source image.
    """

    prior_token_ids: NDArray[np.int32]
    tokens: dict[str, int]
    source_token_ids: NDArray[np.int32]
    source_grids: tuple[Grid, ...]


class ArEngine:
    """The decoder and the vision tower, their slots and their queue on one device, or on several.

    Args:
        checkpoint: where the models come from.
        device: where they run.
        settings: how.
        record: takes what ``ar.measures`` names.
        workers: other devices that share the decoder with ``device``.
        watched: wraps what runs commands on the device, to see one that never ends.
        admission: says when a free slot is filled; None = at once.

    Attributes:
        config: the decoder's numbers.
        source_rule: how source images are sized.
        executor: what runs on the devices; the scheduler's while the engine is open.

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
        watched: Callable[[Run], Run] = lambda run: run,
        admission: Admission | None = None,
    ) -> None:
        device.set_current()
        dtype = settings.dtype or device.default_dtype
        self.config = ArConfig.read(checkpoint)
        self._settings = settings
        slots, positions = settings.max_num_seqs, settings.max_sequence_tokens
        self._tokenizer = PromptTokenizer(GlmImageProcessor.from_pretrained(checkpoint.path("processor")))
        self._image_processor = checkpoint.image_processor
        self.source_rule = checkpoint.source_rule
        layout = ParallelLayout(tp=1 + len(workers.devices))
        self.executor = _loaded(
            device, partial(start_ranks, load_executor, (checkpoint, settings), device, layout, workers)
        )
        record(KV_CACHE_BYTES, KvCache.bytes_needed(self.config, slots, positions, dtype))
        first = self._warm_up_commands(device.warmup_sizes)
        self._scheduler = Scheduler(watched(self.executor.run), slots, settings.max_queue, record, first, admission)

    @property
    def sampling(self) -> Sampling:
        """The checkpoint's own sampling."""
        return self.config.sampling

    def is_alive(self) -> bool:
        """Whether requests are still worked on; does not return when the engine's lock is never released."""
        return self._scheduler.is_alive()

    def submit(self, context: RequestContext, request: ResolvedRequest) -> Future[ArResult]:
        """Queues a request.

        Raises:
            InvalidInputError: the prompt and the picture have more tokens than a slot holds.
            UnavailableError: the queue is full.
        """
        prompt_ids, placed = self._prompt(request)
        source_tokens = sum(grid.tokens for _, grid in placed)
        target = request.target
        preview_tokens = sum(grid.tokens for grid in request.grids) - target.tokens
        most = self._settings.max_sequence_tokens - preview_tokens - target.tokens
        if most < 1:
            raise InvalidInputError.of(
                "height x width",
                f"{request.requested.height} x {request.requested.width}",
                f"pictures of less than {self._settings.max_sequence_tokens} tokens (max_sequence_tokens)",
            )
        if len(prompt_ids) > most:
            raise InvalidInputError.of(
                "prompt",
                f"{len(prompt_ids)} tokens long" + f", {source_tokens} of them of image" * bool(placed),
                f"at most {most} beside the picture's (max_sequence_tokens)",
            )
        counts = {
            "prompt": len(prompt_ids) - source_tokens,
            "source": source_tokens,
            "preview": preview_tokens,
            "image": target.tokens,
        }
        sources = Sources(patches_of(self._image_processor, request.sources), placed) if placed else None
        result: Future[ArResult] = Future()
        tokens = self._scheduler.submit(context, tuple(prompt_ids), request, sources)
        tokens.add_done_callback(lambda done: _forward_result(done, preview_tokens, counts, sources, result))
        return result

    def _prompt(self, request: ResolvedRequest) -> tuple[list[int], tuple[PlacedGrid, ...]]:
        prompt = request.parameters.prompt
        if request.sources:
            return self._tokenizer.image_to_image(prompt, request.target, [source.grid for source in request.sources])
        preview, target = request.grids
        return self._tokenizer.text_to_image(prompt, target, preview), ()

    def _warm_up_commands(self, sizes: tuple[Size, ...]) -> list[Command]:
        ids = self._tokenizer.text_to_image("warm-up", Grid(1, 1), Grid(1, 1))
        sources = []
        for grid in (source_grid(size, self.source_rule) for size in sizes):
            height, width = (side * self.source_rule.patch for side in grid)
            blank = Source(np.zeros((height, width, 3), dtype=np.uint8), grid)
            sources.append(Encode(patches_of(self._image_processor, [blank]), (grid,)))
        return warmup_commands(ids, sources, self.sampling, self._settings.max_sequence_tokens)

    def close(self) -> None:
        """Ends what runs and what waits, and stops the engine's thread and its other ranks."""
        self.close_scheduler()
        self.executor.close()

    def close_scheduler(self) -> None:
        """Ends what runs and what waits; ``executor`` is the caller's from then on."""
        self._scheduler.close()


def _loaded(device: Device, load: Callable[[], RankExecutor]) -> RankExecutor:
    """Loads; on the host in a thread that then ends, so that only the scheduler's has ever computed."""
    if not device.is_host:
        return load()
    with ThreadPoolExecutor(1, thread_name_prefix="ar-loading") as loading:
        return loading.submit(load).result()


def _forward_result(
    tokens: Future[NDArray[np.int32]],
    preview_tokens: int,
    counts: dict[str, int],
    sources: Sources | None,
    result: Future[ArResult],
) -> None:
    error = tokens.exception()
    if error is not None:
        result.set_exception(error)
        return
    source_ids: NDArray[np.int32] = np.zeros(0, np.int32)
    grids: tuple[Grid, ...] = ()
    if sources is not None and sources.token_ids is not None:
        source_ids, grids = sources.token_ids, tuple(placed.grid for placed in sources.placed)
    result.set_result(ArResult(tokens.result()[:, preview_tokens:], counts, source_ids, grids))

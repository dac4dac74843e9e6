"""The first stage, put together: a validated request becomes tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from glm_image.ar.admission import Admission
from glm_image.ar.config import ArConfig
from glm_image.ar.executor import Command, Encode, Executor
from glm_image.ar.graphs import captured
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.measures import KV_CACHE_BYTES
from glm_image.ar.memory import activation_bytes, state_bytes, weight_bytes
from glm_image.ar.model import Decoder
from glm_image.ar.scheduler import Run, Scheduler, Sources
from glm_image.ar.vision import Vision, patches_of
from glm_image.ar.warm_up import warm_up_commands
from glm_image.checkpoint import Checkpoint
from glm_image.devices import Device, check_budget
from glm_image.errors import InvalidInputError
from glm_image.geometry import Grid, PlacedGrid, Size, source_grid
from glm_image.job import Job
from glm_image.measures import Record, keep_nothing
from glm_image.prompts import PromptTokenizer
from glm_image.request import ResolvedRequest, Sampling
from glm_image.sources import Source


@dataclass(frozen=True)
class ArSettings:
    """How the first stage runs.

    Attributes:
        dtype: None = the device's default.
        max_num_seqs: sequences that decode together.
        max_sequence_tokens: prompt and image tokens of one sequence.
        max_queue: requests that may wait.
        graph_mode: ``NONE``, ``FULL_DECODE_ONLY``, or ``FULL``, which runs as the latter.
        graph_capture_sizes: sequences of the captured step; () = max_num_seqs, the only size there is.
        memory_utilization: share of the device's memory this stage may use.
        int8: whether the decoder's linear layers keep int8 weights.
    """

    dtype: torch.dtype | None = None
    max_num_seqs: int = 8
    max_sequence_tokens: int = 8192
    max_queue: int = 64
    graph_mode: str = "FULL_DECODE_ONLY"
    graph_capture_sizes: tuple[int, ...] = ()
    memory_utilization: float = 0.9
    int8: bool = False


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
    """The decoder and the vision tower, their slots and their queue on one device.

    Args:
        checkpoint: where they come from.
        device: where they run.
        settings: how.
        record: takes what ``ar.measures`` names.
        watched: wraps what runs commands on the device, to see one that never ends.
        admission: says when a free slot is filled; None = at once.

    Attributes:
        config: the decoder's numbers.
        source_rule: how source images are sized.
        executor: what runs on the device; the scheduler's while the engine is open.

    Raises:
        CheckpointError: a tensor is missing or has a wrong shape.
        ConfigurationError: a setting is not allowed, or the device is too small.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        settings: ArSettings,
        record: Record = keep_nothing,
        watched: Callable[[Run], Run] = lambda run: run,
        admission: Admission | None = None,
    ) -> None:
        from transformers import GlmImageProcessor  # noqa: PLC0415 - seconds to import, so not before a device is chosen

        device.bind()
        dtype = settings.dtype or device.default_dtype
        self.config = ArConfig.read(checkpoint)
        self._settings = settings
        slots, positions = settings.max_num_seqs, settings.max_sequence_tokens
        capture = captured(settings.graph_mode, settings.graph_capture_sizes, slots)
        self._tokenizer = PromptTokenizer(GlmImageProcessor.from_pretrained(checkpoint.path("processor")))
        self._image_processor = checkpoint.image_processor
        self.source_rule = checkpoint.source_rule
        _check_memory(self.config, device, settings, dtype, Vision.bytes_needed(checkpoint, dtype))
        source = checkpoint.tensors("vision_language_encoder", device.torch_device, dtype)
        self.executor = Executor(
            Decoder.load(self.config, source, int8=device.int8_product if settings.int8 else None),
            device,
            slots,
            positions,
            capture=capture,
            vision=Vision.load(checkpoint, device.torch_device, dtype),
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

    def submit(self, job: Job, request: ResolvedRequest) -> Future[ArResult]:
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
        tokens = self._scheduler.submit(job, tuple(prompt_ids), request, sources)
        tokens.add_done_callback(lambda done: _hand_on(done, preview_tokens, counts, sources, result))
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
        return warm_up_commands(ids, sources, self.sampling, self._settings.max_sequence_tokens)

    def close(self) -> None:
        """Ends what runs and what waits, and stops the engine's thread."""
        self._scheduler.close()


def _hand_on(
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


def _check_memory(
    config: ArConfig, device: Device, settings: ArSettings, dtype: torch.dtype, vision_bytes: int
) -> None:
    shape = (config, settings.max_num_seqs, settings.max_sequence_tokens, dtype)
    check_budget(
        "glm_ar",
        fixed={"weights": weight_bytes(config, dtype, int8=settings.int8) + vision_bytes},
        scaled={**state_bytes(*shape), "the longest prompt": activation_bytes(*shape, int8=settings.int8)},
        memory=device.memory(),
        utilization=settings.memory_utilization,
        device=str(device),
        lower="max_num_seqs or max_sequence_tokens",
    )

"""Requests and sequences of the AR scheduler. Touches no tensors."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glm_image.lifecycle.context import Progress, RequestContext
from glm_image.request.geometry import Grid, PlacedGrid
from glm_image.request.parameters import ResolvedRequest
from glm_image.request.stages import Stage


@dataclass(frozen=True)
class ArResult:
    """The tokens of a request.

    Attributes:
        prior_token_ids: int32 [images, tokens of the image's grid], before upsampling.
        tokens: number of tokens by kind: prompt, source, preview, image.
        steps: decode steps of each image, after its prefill.
        source_token_ids: int32 [tokens of all source images].
    """

    prior_token_ids: NDArray[np.int32]
    tokens: dict[str, int]
    steps: tuple[int, ...]
    source_token_ids: NDArray[np.int32]
    source_grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Sources:
    """The source images of a request.

    Attributes:
        patches: fp32 [tokens, channels of a patch], the input of the vision tower.
        placed: the position of each image in the prompt.
    """

    patches: NDArray[np.float32]
    placed: tuple[PlacedGrid, ...]

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(placed.grid for placed in self.placed)

    def insert(self, prompt_ids: tuple[int, ...], token_ids: NDArray[np.int32]) -> tuple[int, ...]:
        """Returns the prompt with the images' tokens, int32 [tokens of all images], at their positions."""
        filled, begin = list(prompt_ids), 0
        for start, grid in self.placed:
            filled[start : start + grid.tokens] = token_ids[begin : begin + grid.tokens].tolist()
            begin += grid.tokens
        return tuple(filled)


@dataclass
class Sampled:
    """Number of a request's tokens sampled so far. The context, which outlives the request, refers to this alone."""

    done: int
    total: int

    def progress(self) -> Progress:
        return Progress(Stage.DECODE, self.done, self.total)


@dataclass(eq=False)
class Request:
    """A request from its arrival in the queue to its result.

    Attributes:
        prompt_ids: the prompt; its source images' tokens are inserted once they are encoded.
        source_token_ids: int32 [tokens of all source images]; empty before they are encoded.
        waiting: indices of the images that have had no slot yet.
        tokens: int32 [tokens of all grids] of each finished image, by index.
        steps: decode steps of each finished image, by index.
        admit_by: when the admission policy's wait ends, in the clock of the scheduler; inf before the request is first
            in the queue.
        sampled: progress over all images.
    """

    context: RequestContext
    prompt_ids: tuple[int, ...]
    resolved: ResolvedRequest
    submitted: float = field(default_factory=time.monotonic)
    sources: Sources | None = None
    source_token_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    future: Future[ArResult] = field(default_factory=Future)
    waiting: deque[int] = field(init=False)
    tokens: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    admit_by: float = math.inf
    sampled: Sampled = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = deque(range(self.images))
        self.sampled = Sampled(0, self.length * self.images)

    @property
    def images(self) -> int:
        """Each takes a slot."""
        return len(self.resolved.seeds)

    @property
    def length(self) -> int:
        """Tokens to sample for each image, the preview's included."""
        return sum(grid.tokens for grid in self.resolved.grids)

    @property
    def preview_length(self) -> int:
        """Tokens to sample before those of the image's own grid."""
        return self.length - self.resolved.target.tokens

    @property
    def has_begun(self) -> bool:
        """Whether one of its images has a slot or had one."""
        return len(self.waiting) < self.images

    @property
    def is_complete(self) -> bool:
        return len(self.tokens) == self.images

    def result(self) -> ArResult:
        grids = self.sources.grids if self.sources else ()
        source_tokens = sum(grid.tokens for grid in grids)
        return ArResult(
            prior_token_ids=np.stack([self.tokens[index][self.preview_length :] for index in range(self.images)]),
            tokens={
                "prompt": len(self.prompt_ids) - source_tokens,
                "source": source_tokens,
                "preview": self.preview_length,
                "image": self.resolved.target.tokens,
            },
            steps=tuple(self.steps[index] for index in range(self.images)),
            source_token_ids=self.source_token_ids,
            source_grids=grids,
        )


@dataclass
class Running:
    """A sequence in a slot: image ``index`` of a request.

    Attributes:
        left: tokens to sample.
        since: ``time.monotonic()`` at its first token.
        steps: decode steps that it took part in.
    """

    request: Request
    index: int
    left: int
    since: float
    steps: int = 0


def report_progress(running: Iterable[Running]) -> None:
    """Publishes the progress of each watched request; called after every step, mostly without a watcher."""
    contexts = [sequence.request.context for sequence in running]
    for context in dict.fromkeys(context for context in contexts if context.is_watched):
        context.publish_progress()

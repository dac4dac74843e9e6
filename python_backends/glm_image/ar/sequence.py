"""What the first stage's scheduler keeps of its requests. Touches no tensors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glm_image.lifecycle.context import Progress, RequestContext
from glm_image.request.geometry import PlacedGrid
from glm_image.request.parameters import ResolvedRequest
from glm_image.request.stages import Stage


@dataclass
class Sources:
    """The source images of a request.

    Attributes:
        patches: fp32 [tokens, channels of a patch], what the vision tower reads.
        placed: where in the prompt they are.
        token_ids: int32 [tokens], what the vision tower made of them; None before the request's first turn.
    """

    patches: NDArray[np.float32]
    placed: tuple[PlacedGrid, ...]
    token_ids: NDArray[np.int32] | None = None

    def fill(self, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the prompt with the images' tokens at their places."""
        assert self.token_ids is not None
        filled, begin = list(prompt_ids), 0
        for start, grid in self.placed:
            filled[start : start + grid.tokens] = self.token_ids[begin : begin + grid.tokens].tolist()
            begin += grid.tokens
        return tuple(filled)


@dataclass
class Sampled:
    """How many of a request's tokens are drawn; apart from the request, as its job outlives that."""

    done: int
    total: int

    def progress(self) -> Progress:
        """Returns it as a job tells it."""
        return Progress(Stage.DECODE, self.done, self.total)


@dataclass(eq=False)
class Request:
    """A request from its queue to its end.

    Attributes:
        context: looked at between steps.
        prompt_ids: the prompt.
        resolved: what is asked for.
        submitted: ``time.monotonic()`` when it came.
        sources: its source images, if any.
        future: gives its tokens.
        waiting: the pictures that have no slot yet.
        tokens: those of finished pictures.
        latest: when it is let in at the latest; inf before it is the first in line.
        drawn: how far it is.
    """

    context: RequestContext
    prompt_ids: tuple[int, ...]
    resolved: ResolvedRequest
    submitted: float
    sources: Sources | None = None
    future: Future[NDArray[np.int32]] = field(default_factory=Future)
    waiting: deque[int] = field(default_factory=deque)
    tokens: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    latest: float = math.inf
    drawn: Sampled = field(init=False)

    def __post_init__(self) -> None:
        self.drawn = Sampled(0, self.length * len(self.resolved.seeds))

    @property
    def length(self) -> int:
        """Tokens of each picture."""
        return sum(grid.tokens for grid in self.resolved.grids)

    @property
    def has_begun(self) -> bool:
        """Whether a picture of it has got a slot."""
        return len(self.waiting) < len(self.resolved.seeds)


@dataclass
class Running:
    """A sequence in a slot: one picture of a request, the steps that are left to it, and when they began."""

    request: Request
    index: int
    left: int
    since: float


def report_progress(running: Iterable[Running]) -> None:
    """Tells who watches how far their requests are; called after every step, and mostly for nobody."""
    contexts = [one.request.context for one in running]
    for context in dict.fromkeys(context for context in contexts if context.is_watched):
        context.publish_progress()

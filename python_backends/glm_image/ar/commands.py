"""The commands of the AR's executor: plain data, which is sent to every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm_image.parallel.commands import Command, R_co
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid, PlacedGrid
from glm_image.request.parameters import Sampling

MEMORY_SETTINGS = "max_num_seqs or max_sequence_tokens"
"""The parameters that reduce the memory of every command."""


class ArCommand(Command[R_co]):
    """A command of the AR executor; an out-of-memory error names its ``operation`` and the ``setting`` to lower."""

    @property
    def operation(self) -> str:
        return "a decode step"

    @property
    def setting(self) -> str:
        return MEMORY_SETTINGS


@dataclass(frozen=True)
class Encode(ArCommand[NDArray[np.int32]]):
    """Encode source images, fp32 [tokens of all grids, channels of a patch], to tokens int32 [tokens of all grids]."""

    patches: NDArray[np.float32]
    grids: tuple[Grid, ...]

    @property
    def operation(self) -> str:
        sides = [(grid.width * PIXELS_PER_TOKEN, grid.height * PIXELS_PER_TOKEN) for grid in self.grids]
        return f"the encoding of source images of {', '.join(f'{width} x {height}' for width, height in sides)} pixels"

    @property
    def setting(self) -> str:
        return f"their number or size, or {MEMORY_SETTINGS}"


@dataclass(frozen=True)
class Admit(ArCommand[None]):
    """Prefill a prompt into an idle slot and sample its first token.

    Attributes:
        prompt_ids: the prompt, with the tokens of its source images.
        grids: the grids to generate: the preview's, if any, then the image's.
        seed: of the slot's noise.
        sources: where the source images are in the prompt.
    """

    slot: int
    prompt_ids: tuple[int, ...]
    grids: tuple[Grid, ...]
    sampling: Sampling
    seed: int
    sources: tuple[PlacedGrid, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(grid.tokens for grid in self.grids)

    @property
    def operation(self) -> str:
        return f"the prefill of {len(self.prompt_ids)} tokens"

    @property
    def setting(self) -> str:
        return f"its length, source images included, or {MEMORY_SETTINGS}"


@dataclass(frozen=True)
class Step(ArCommand[None]):
    """Sample ``count`` more tokens for every admitted slot; none may have fewer left."""

    count: int


@dataclass(frozen=True)
class Advanced:
    """What a step of Jacobi decoding did for a slot: of ``width`` tokens that it sampled, ``accepted`` proved right."""

    slot: int
    width: int
    accepted: int


@dataclass(frozen=True)
class Advance(ArCommand[tuple[Advanced, ...]]):
    """Take a step of Jacobi decoding in place of ``Step``: every slot samples 1 to ``width`` more tokens.

    The result is of the steps that have ended meanwhile, each once; without those of slots made idle since.

    Attributes:
        widths: slots and their widths, at least 1 and at most what the slot has left for all that is known.
    """

    widths: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Peek(ArCommand[NDArray[np.int32]]):
    """Return the first ``count`` tokens of a slot, int32 [count], which must have been sampled."""

    slot: int
    count: int


@dataclass(frozen=True)
class Release(ArCommand[NDArray[np.int32]]):
    """Make a slot idle and return the tokens sampled in it, int32 [tokens]; waits for the steps under way."""

    slot: int


@dataclass(frozen=True)
class Discard(ArCommand[None]):
    """Make a slot idle without its tokens; waits for nothing."""

    slot: int

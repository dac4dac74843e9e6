"""What the scheduler of the first stage has its executor do: plain data, which can be sent to other ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm_image.request.geometry import Grid, PlacedGrid
from glm_image.request.parameters import Sampling


@dataclass(frozen=True)
class Encode:
    """Turn source images into their tokens."""

    patches: NDArray[np.float32]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Admit:
    """Read a prompt into an idle slot and draw its first token."""

    slot: int
    prompt_ids: tuple[int, ...]
    grids: tuple[Grid, ...]
    sampling: Sampling
    seed: int
    sources: tuple[PlacedGrid, ...] = ()


@dataclass(frozen=True)
class Step:
    """Draw ``count`` more tokens for every admitted slot; none may have fewer left."""

    count: int


@dataclass(frozen=True)
class Peek:
    """Hand over the first ``count`` tokens of a slot, which goes on; they have been drawn."""

    slot: int
    count: int


@dataclass(frozen=True)
class Release:
    """Make a slot idle and hand over the tokens it has drawn.

    Handing over waits for the steps that are under way; where nobody wants the tokens, nothing is waited for.
    """

    slot: int
    wanted: bool = True


Command = Encode | Admit | Step | Peek | Release

"""Sizes, token grids, token budgets and positions: pure functions on integers and NumPy arrays.

The formulas are those of GLM-Image's processor (transformers ``processing_glm_image.py``) and pipeline (diffusers
``pipeline_glm_image.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PIXELS_PER_TOKEN = 32
"""Side of the square of pixels that one prior token stands for."""

PREVIEW_SIDE = PIXELS_PER_TOKEN // 2
"""Side of the preview grid of a square picture, in tokens."""


class Grid(NamedTuple):
    """A grid of tokens."""

    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of tokens in the grid."""
        return self.height * self.width


class Size(NamedTuple):
    """A picture's size in pixels."""

    height: int
    width: int


def generated_size(requested: Size) -> Size:
    """Rounds both sides up to the multiples of 32 that the model can make."""
    return Size(*(-(-side // PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for side in requested))


def target_grid(generated: Size) -> Grid:
    """Returns the token grid of a picture whose sides are multiples of 32."""
    return Grid(generated.height // PIXELS_PER_TOKEN, generated.width // PIXELS_PER_TOKEN)


def preview_grid(target: Grid) -> Grid:
    """Returns the small grid that text-to-image writes before the target's.

    It has about 256 tokens and the target's aspect; never less than one token a side (the reference's formula gives 0
    beyond an aspect of 256).
    """
    ratio = target.height / target.width
    return Grid(max(1, int(math.sqrt(ratio) * PREVIEW_SIDE)), max(1, int(math.sqrt(1 / ratio) * PREVIEW_SIDE)))


def output_grids(target: Grid, *, image_to_image: bool) -> tuple[Grid, ...]:
    """Returns the grids in the order in which the AR writes them: preview then target, or the target alone."""
    return (target,) if image_to_image else (preview_grid(target), target)


def token_budget(grids: Sequence[Grid]) -> int:
    """Returns how many tokens the reference generates for ``grids``: all of theirs and the end of the image."""
    return sum(grid.tokens for grid in grids) + 1


def decode_positions(grids: Sequence[Grid], start: int) -> NDArray[np.int64]:
    """Returns the M-RoPE positions of generated tokens.

    Args:
        grids: grids in the order in which they are written.
        start: the first position after the prompt's.

    Returns:
        int64 [3, tokens of all grids]: axes T, H, W. All tokens of a grid share T; H and W count its rows and columns
        from there, row by row; the next grid starts after the longer side.
    """
    parts = []
    base = start
    for grid in grids:
        rows, columns = np.divmod(np.arange(grid.tokens, dtype=np.int64), grid.width)
        parts.append(np.stack([np.full_like(rows, base), base + rows, base + columns]))
        base += max(grid)
    return np.concatenate(parts, axis=1)


def text_positions(length: int) -> NDArray[np.int64]:
    """Returns the M-RoPE positions of ``length`` text tokens: int64 [3, length], one ramp on all three axes."""
    return np.tile(np.arange(length, dtype=np.int64), (3, 1))


def upsample_tokens(token_ids: NDArray[np.int32], grid: Grid) -> NDArray[np.int32]:
    """Doubles both sides of a token grid by repetition: one id for each 16x16 pixels.

    Args:
        token_ids: int32 [grid.tokens], row by row.
        grid: the grid they fill.

    Returns:
        int32 [4 * grid.tokens], row by row.
    """
    return token_ids.reshape(grid).repeat(2, axis=0).repeat(2, axis=1).reshape(-1)

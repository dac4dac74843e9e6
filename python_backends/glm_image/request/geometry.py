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

from glm_image.errors import InvalidInputError

PIXELS_PER_TOKEN = 32
"""Side of the square that one prior token covers, in pixels."""

PREVIEW_SIDE = PIXELS_PER_TOKEN // 2
"""Side of the preview grid of a square image, in tokens."""

MAX_SOURCE_ASPECT = 4
"""Largest ratio of a source image's longer side to its shorter side."""


class Grid(NamedTuple):
    """A grid of tokens."""

    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


class Size(NamedTuple):
    """An image's size in pixels."""

    height: int
    width: int


class PlacedGrid(NamedTuple):
    """A source image in a prompt: the index of its first token, and its grid."""

    start: int
    grid: Grid


class SourceRule(NamedTuple):
    """How a checkpoint sizes source images; the defaults are those of the published checkpoint.

    Attributes:
        patch: side of a token in pixels of the vision tower's input, which has half the generated size.
        shortest_edge: pixels; images with a shorter side are enlarged to it.
        longest_edge: pixels; images with a longer side are reduced to it.
        resample: Pillow's number of the filter that scales the vision tower's input.
    """

    patch: int = PIXELS_PER_TOKEN // 2
    shortest_edge: int = 512
    longest_edge: int = 2048
    resample: int = 3


PUBLISHED_RULE = SourceRule()


def generated_size(requested: Size) -> Size:
    """Rounds both sides up to multiples of 32, the sizes that the model generates."""
    return Size(*(-(-side // PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for side in requested))


def target_grid(generated: Size) -> Grid:
    """Returns the token grid of an image whose sides are multiples of 32."""
    return Grid(generated.height // PIXELS_PER_TOKEN, generated.width // PIXELS_PER_TOKEN)


def rendered_size(grid: Grid) -> Size:
    """Returns the size in pixels of the image that a grid of tokens covers."""
    return Size(grid.height * PIXELS_PER_TOKEN, grid.width * PIXELS_PER_TOKEN)


def check_aspect(size: Size, name: str = "image") -> None:
    """Refuses a source image whose aspect ratio the model does not support."""
    if max(size) > MAX_SOURCE_ASPECT * min(size):
        allowed = f"the longer side at most {MAX_SOURCE_ASPECT} times the shorter side"
        raise InvalidInputError.of(name, f"{size.width} x {size.height} pixels", allowed)


def source_grid(original: Size, rule: SourceRule, name: str = "image") -> Grid:
    """Returns the token grid of a source image, computed from the size of the original alone.

    As transformers' ``smart_resize``, which halves first and rounds halves to even. Images with a side below ``patch``,
    which it refuses, are halved exactly, so that they keep their aspect ratio.
    """
    check_aspect(original, name)
    scale = 1.0
    if min(original) < rule.shortest_edge:
        scale = rule.shortest_edge / min(original)
    if max(original) * scale > rule.longest_edge:
        scale = rule.longest_edge / max(original)
    halves = (side // 2 if min(original) >= rule.patch else side / 2 for side in original)
    return Grid(*(max(1, round(half * scale / rule.patch)) for half in halves))


def preview_grid(target: Grid) -> Grid:
    """Returns the preview grid, which text-to-image generates before the target's.

    It has about 256 tokens and the target's aspect ratio, and at least one token a side (the reference's formula gives
    0 beyond a ratio of 256).
    """
    ratio = target.height / target.width
    return Grid(max(1, int(math.sqrt(ratio) * PREVIEW_SIDE)), max(1, int(math.sqrt(1 / ratio) * PREVIEW_SIDE)))


def output_grids(target: Grid, *, image_to_image: bool) -> tuple[Grid, ...]:
    """Returns the grids in the order in which the AR generates them: preview and target, or the target alone."""
    return (target,) if image_to_image else (preview_grid(target), target)


def preview_of(grids: Sequence[Grid]) -> Grid | None:
    """Returns the preview grid of ``output_grids`` if it has less than half of the target's tokens, else None."""
    return grids[0] if 2 * grids[0].tokens < grids[-1].tokens else None


def decode_positions(grids: Sequence[Grid], start: int) -> NDArray[np.int64]:
    """Returns the M-RoPE positions of generated tokens, int64 [3, tokens of all grids]: axes T, H, W.

    All tokens of a grid share T; H and W count its rows and columns from T, row by row; the next grid starts after the
    longer side. ``start`` is the first position after the prompt's.
    """
    parts = []
    for grid in grids:
        parts.append(_grid_positions(grid, start))
        start += max(grid)
    return np.concatenate(parts, axis=1)


def _grid_positions(grid: Grid, start: int) -> NDArray[np.int64]:
    rows, columns = np.divmod(np.arange(grid.tokens, dtype=np.int64), grid.width)
    return np.stack([np.full_like(rows, start), start + rows, start + columns])


def text_positions(length: int, start: int = 0) -> NDArray[np.int64]:
    """Returns the M-RoPE positions of ``length`` text tokens: int64 [3, length], one ramp on all three axes."""
    return np.tile(np.arange(start, start + length, dtype=np.int64), (3, 1))


def prompt_positions(length: int, sources: Sequence[PlacedGrid] = ()) -> NDArray[np.int64]:
    """Returns the M-RoPE positions of a prompt with its source images, int64 [3, length].

    A source image takes as many positions as its longer side, and a text token one.
    """
    parts = []
    token = position = 0
    for start, grid in sources:
        parts.append(text_positions(start - token, position))
        position += start - token
        parts.append(_grid_positions(grid, position))
        position += max(grid)
        token = start + grid.tokens
    parts.append(text_positions(length - token, position))
    return np.concatenate(parts, axis=1)


def upsample_tokens(token_ids: NDArray[np.int32], grid: Grid) -> NDArray[np.int32]:
    """Doubles both sides of a token grid by repetition: int32 [grid.tokens] to [4 * grid.tokens], row by row."""
    return token_ids.reshape(grid).repeat(2, axis=0).repeat(2, axis=1).reshape(-1)

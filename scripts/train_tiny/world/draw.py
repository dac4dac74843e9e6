"""Pictures of scenes, many at once: backgrounds by arithmetic, things by signed distances, words by a glyph atlas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .layout import Board, lettered_side
from .scene import MOST_THINGS, Scene
from .shapes import SHAPE_LAYERS, Layers
from .table import NO_THING, Table
from .vocabulary import BACKGROUNDS, COLOURS, LETTERS, SHAPES, Rgb

TILES: Final = 8
"""Stripes and squares of checks along the short side."""
INK, BOARD = 10.0, 255.0
RGB: Final = np.asarray(list(COLOURS.values()))


def draw(scenes: Sequence[Scene] | Table, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Draws scenes.

    Args:
        scenes: what is on the pictures, one by one or as a table.
        height: of all pictures, in pixels; a multiple of 32.
        width: likewise.
        device: where the work is done and the pictures are.

    Returns:
        uint8 [n, 3, height, width].
    """
    table = scenes if isinstance(scenes, Table) else Table.of(scenes)
    pictures = _backgrounds(table, height, width, torch.device(device))
    # The last ones first: what is inside comes before what holds it.
    for thing in reversed(range(MOST_THINGS)):
        _draw_things(pictures, table, thing)
    _draw_signs(pictures, table)
    return pictures.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _backgrounds(table: Table, height: int, width: int, device: torch.device) -> Tensor:
    first, last = torch.from_numpy(table.ends).to(device, torch.float32).unbind(1)
    tile = min(height, width) / TILES
    y = torch.arange(height, device=device)[:, None].expand(height, width)
    x = torch.arange(width, device=device)[None].expand(height, width)
    column, row = (x / tile).floor(), (y / tile).floor()
    patterns = {
        "plain": torch.zeros_like(column),
        "gradient": (y + 0.5) / height,
        "stripes": column % 2,
        "checks": (column + row) % 2,
    }
    kinds = torch.from_numpy(table.backgrounds).to(device)
    share = torch.stack([patterns[kind] for kind in BACKGROUNDS])[kinds][:, None]
    return first[..., None, None] + (last - first)[..., None, None] * share


def _draw_things(pictures: Tensor, table: Table, thing: int) -> None:
    height, width = pictures.shape[-2:]
    circles = table.circles(thing, height, width)
    rows = np.flatnonzero(table.shapes[:, thing] != NO_THING)
    # Those of one shape are drawn together, in squares of the largest: on a GPU launches take longer than their work.
    # All are copied at once, since a copy waits for the device.
    rows = rows[np.lexsort((circles.radius[rows], table.shapes[rows, thing]))]
    shapes, counts = np.unique(table.shapes[rows, thing], return_counts=True)
    largest = circles.radius[rows[counts.cumsum() - 1]]
    values = np.stack([circles.x[rows], circles.y[rows], circles.radius[rows], *RGB[table.colours[rows, thing]].T], 1)
    members = torch.from_numpy(rows).to(pictures.device).split(counts.tolist())
    found = torch.from_numpy(values.astype(np.float32)).to(pictures.device).split(counts.tolist())
    for shape, chosen, own, radius in zip(shapes.tolist(), members, found, largest.tolist(), strict=True):
        _draw_alike(pictures, chosen[:, None, None], own, SHAPE_LAYERS[SHAPES[shape]], radius)


def _draw_alike(pictures: Tensor, chosen: Tensor, values: Tensor, layers: Layers, largest: float) -> None:
    height, width = pictures.shape[-2:]
    centre_x, centre_y, radius = values[:, :3].T[..., None]
    colour = values[:, 3:][:, None, None]
    # A shape changes nothing outside the square around its circle.
    rows, columns = _around(centre_y, largest, height)[..., None], _around(centre_x, largest, width)[:, None]
    radius = radius[..., None]
    x, y = (columns + 0.5 - centre_x[..., None]) / radius, (rows + 0.5 - centre_y[..., None]) / radius
    drawn = pictures[chosen, :, rows, columns]  # [n, rows, columns, 3]
    for layer in layers(*torch.broadcast_tensors(x, y)):
        cover = (0.5 - layer.distance * radius).clamp_(0, 1)[..., None]
        paint = colour if layer.paint is None else _paint(layer.paint, colour.device)
        drawn = drawn + (paint - drawn) * cover
    pictures[chosen, :, rows, columns] = drawn


@lru_cache
def _paint(rgb: Rgb, device: torch.device) -> Tensor:
    return torch.tensor(rgb, dtype=torch.float32, device=device)


def _around(centre: Tensor, radius: float, length: int) -> Tensor:
    """The pixels within ``radius`` and a half of each centre, and a few more: [n, pixels], all inside the picture."""
    side = min(math.ceil(2 * radius) + 4, length)
    start = (centre - side / 2).floor().long().clamp(0, length - side)
    return start + torch.arange(side, device=centre.device)


def _draw_signs(pictures: Tensor, table: Table) -> None:
    height, width = pictures.shape[-2:]
    atlas = torch.from_numpy(glyph_atlas(lettered_side(height, width))).to(pictures.device)
    for signs in table.signs():
        chosen, glyphs = (torch.from_numpy(ids).to(pictures.device) for ids in (signs.rows, signs.letters))
        board = Board.of(glyphs.shape[1], signs.place, height, width)
        # [n, cell height, letters * cell width]
        line = atlas[glyphs].permute(0, 2, 1, 3).flatten(2)
        bottom, right, border = board.top + line.shape[1], board.left + line.shape[2], board.border
        pictures[chosen, :, board.top - border : bottom + border, max(0, board.left - border) : right + border] = INK
        pictures[chosen, :, board.top : bottom, board.left : right] = (BOARD + (INK - BOARD) * line)[:, None]


@lru_cache(maxsize=32)
def glyph_atlas(side: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    """Renders the letters of pictures whose ``lettered_side`` has so many pixels.

    Returns:
        float32 [letters, cell height, cell width], 1 where there is ink.
    """
    board = Board.of(1, "bottom", side, side)
    font = ImageFont.load_default(0.175 * side)
    stroke = max(1, round(0.004 * side))
    ascent = -round(font.getbbox("H", anchor="ls")[1])
    cells = []
    for letter in LETTERS:
        wide = Image.new("L", (2 * board.cell_width, board.cell_height))
        where = (board.cell_width, (board.cell_height + ascent) / 2)
        ImageDraw.Draw(wide).text(where, letter, fill=255, font=font, anchor="ms", stroke_width=stroke)
        ink = wide.crop(wide.getbbox())
        # The widest letters are squeezed; each is centred by its ink.
        ink = ink.resize((min(ink.width, round(0.9 * board.cell_width)), ink.height))
        cell = Image.new("L", (board.cell_width, board.cell_height))
        cell.paste(ink, ((board.cell_width - ink.width) // 2, (board.cell_height - ascent) // 2 - stroke))
        cells.append(np.asarray(cell) / np.float32(255))
    return np.stack(cells).astype(np.float32)

"""Pictures of scenes, many at once: backgrounds by arithmetic, things by signed distances, words by a glyph atlas."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .scene import SIGN_BAND, Scene
from .shapes import SHAPE_LAYERS
from .vocabulary import BACKGROUND_COLOURS, BACKGROUNDS, COLOURS, LETTERS

TILES: Final = 8
"""Stripes and squares of checks along the short side."""
CELL_WIDTH, CELL_HEIGHT = 0.145, 0.17
"""Of a letter, in short sides of the picture."""
BORDER: Final = 0.014
"""Of a sign, in short sides of the picture."""
INK, BOARD = 10.0, 255.0


class Frame(NamedTuple):
    """Where things may be, in pixels: the picture without its sign's band."""

    short: int
    top: int
    height: int
    width: int

    @classmethod
    def of(cls, sign_place: str | None, height: int, width: int) -> Frame:
        """Returns the frame of a picture whose sign is at ``sign_place``; None = it has none."""
        short = min(height, width)
        band = round(SIGN_BAND * short) if sign_place else 0
        return cls(short, band if sign_place == "top" else 0, height - band, width)


class Board(NamedTuple):
    """Where a sign is, in pixels: the corner of its first letter, a letter's cell, the border around."""

    top: int
    left: int
    cell_height: int
    cell_width: int
    border: int

    @classmethod
    def of(cls, letters: int, place: str, height: int, width: int) -> Board:
        """Returns where the board is of a word of so many letters."""
        short = min(height, width)
        cell_height, cell_width = round(CELL_HEIGHT * short), round(CELL_WIDTH * short)
        margin = (round(SIGN_BAND * short) - cell_height) // 2
        top = margin if place == "top" else height - margin - cell_height
        return cls(top, (width - letters * cell_width) // 2, cell_height, cell_width, max(1, round(BORDER * short)))


def draw(scenes: Sequence[Scene], height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Draws scenes.

    Args:
        scenes: what is on the pictures.
        height: of all pictures, in pixels; a multiple of 32.
        width: likewise.
        device: where the work is done and the pictures are.

    Returns:
        uint8 [n, 3, height, width].
    """
    pictures = _backgrounds(scenes, height, width, torch.device(device))
    # The last ones first: what is inside comes before what holds it.
    for slot in reversed(range(max((len(scene.things) for scene in scenes), default=0))):
        _draw_things(pictures, scenes, slot)
    _draw_signs(pictures, scenes)
    return pictures.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _backgrounds(scenes: Sequence[Scene], height: int, width: int, device: torch.device) -> Tensor:
    colours = [[BACKGROUND_COLOURS[scene.background.colours[end]] for scene in scenes] for end in (0, -1)]
    first, last = torch.tensor(colours, dtype=torch.float32).to(device)[..., None, None]
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
    kinds = [BACKGROUNDS.index(scene.background.kind) for scene in scenes]
    share = torch.stack([patterns[kind] for kind in BACKGROUNDS])[torch.tensor(kinds, device=device)][:, None]
    return first + (last - first) * share


def _draw_things(pictures: Tensor, scenes: Sequence[Scene], slot: int) -> None:
    height, width = pictures.shape[-2:]
    alike = defaultdict(list)
    for index, scene in enumerate(scenes):
        if slot < len(scene.things):
            circle = _circle(scene, slot, height, width)
            alike[scene.things[slot].shape, circle[2]].append((index, *circle))
    for (shape, radius), members in alike.items():
        chosen = torch.tensor([index for index, *_ in members], device=pictures.device)[:, None, None]
        centre_x, centre_y = torch.tensor([centre for _, *centre, _ in members]).to(pictures.device).T[..., None]
        painted = [COLOURS[scenes[index].things[slot].colour] for index, *_ in members]
        colour = torch.tensor(painted, dtype=torch.float32).to(pictures.device)[:, None, None]
        # A shape changes nothing outside the square around its circle.
        rows, columns = _around(centre_y, radius, height)[..., None], _around(centre_x, radius, width)[:, None]
        x, y = (columns + 0.5 - centre_x[..., None]) / radius, (rows + 0.5 - centre_y[..., None]) / radius
        drawn = pictures[chosen, :, rows, columns]  # [n, rows, columns, 3]
        for layer in SHAPE_LAYERS[shape](*torch.broadcast_tensors(x, y)):
            cover = (0.5 - layer.distance * radius).clamp_(0, 1)[..., None]
            paint = colour if layer.paint is None else colour.new_tensor(layer.paint)
            drawn = drawn + (paint - drawn) * cover
        pictures[chosen, :, rows, columns] = drawn


def _around(centre: Tensor, radius: float, length: int) -> Tensor:
    """The pixels within ``radius`` and a half of each centre, and a few more: [n, pixels], all inside the picture."""
    side = min(math.ceil(2 * radius) + 4, length)
    start = (centre - side / 2).floor().long().clamp(0, length - side)
    return start + torch.arange(side, device=centre.device)


def _circle(scene: Scene, slot: int, height: int, width: int) -> tuple[float, float, float]:
    frame = Frame.of(scene.sign.place if scene.sign else None, height, width)
    thing = scene.things[slot]
    return thing.x * frame.width, frame.top + thing.y * frame.height, scene.diameter(slot) * frame.short / 2


def _draw_signs(pictures: Tensor, scenes: Sequence[Scene]) -> None:
    height, width = pictures.shape[-2:]
    atlas = torch.from_numpy(glyph_atlas(min(height, width))).to(pictures.device)
    alike = defaultdict(list)
    for index, scene in enumerate(scenes):
        if scene.sign:
            alike[scene.sign.place, len(scene.sign.word)].append((index, scene.sign.word))
    for (place, letters), members in alike.items():
        chosen = torch.tensor([index for index, _ in members], device=pictures.device)
        glyphs = torch.tensor([[LETTERS.index(letter) for letter in word] for _, word in members])
        board = Board.of(letters, place, height, width)
        # [n, cell height, letters * cell width]
        line = atlas[glyphs.to(pictures.device)].permute(0, 2, 1, 3).flatten(2)
        bottom, right, border = board.top + line.shape[1], board.left + line.shape[2], board.border
        pictures[chosen, :, board.top - border : bottom + border, max(0, board.left - border) : right + border] = INK
        pictures[chosen, :, board.top : bottom, board.left : right] = (BOARD + (INK - BOARD) * line)[:, None]


@lru_cache(maxsize=32)
def glyph_atlas(short: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    """Renders the letters for pictures whose short side has ``short`` pixels.

    Returns:
        float32 [letters, cell height, cell width], 1 where there is ink.
    """
    board = Board.of(1, "bottom", short, short)
    font = ImageFont.load_default(0.175 * short)
    stroke = max(1, round(0.004 * short))
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

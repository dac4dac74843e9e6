"""Reads the sign of an image: finds its frame, then compares each letter with the renderer's templates."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from train_tiny.world.draw import glyph_atlas
from train_tiny.world.layout import Board, lettered_side
from train_tiny.world.scene import Sign
from train_tiny.world.vocabulary import LETTERS, MAX_LETTERS, SIGN_PLACES

DRIFT: Final = 0.02
"""Maximum offset of a sign, and of a letter in it, from the renderer's position, in units of the letters' side."""
DARK_BELOW: Final = 0.45
FRAME_SHARE: Final = 0.6
"""The share of each side of a sign's frame that must be dark."""


def read_sign(picture: Tensor) -> Sign | None:
    """Returns the sign of an image, or None.

    Args:
        picture: float [3, height, width], 0 to 1.
    """
    grey = picture.mean(0)
    height, width = grey.shape
    found = [
        (*_frame_share(grey, Board.of(letters, place, height, width), letters), letters, place)
        for place in SIGN_PLACES
        for letters in range(1, MAX_LETTERS + 1)
    ]
    share, down, right, letters, place = max(found)
    if share < FRAME_SHARE:
        return None
    board = Board.of(letters, place, height, width)
    return Sign(_read(grey, board._replace(top=board.top + down, left=board.left + right), letters), place)


def _frame_share(grey: Tensor, board: Board, letters: int) -> tuple[float, int, int]:
    """Returns the best position of a frame: the darkness of its palest side there, and the offset down and right."""
    drift, thick = _drift(grey), board.border
    tall, wide = board.cell_height + 2 * thick, letters * board.cell_width + 2 * thick
    # A white margin.
    dark = F.pad((grey < DARK_BELOW).float(), [drift + thick] * 4)
    shifts = 2 * drift + 1

    def side(top: int, left: int, height: int, width: int) -> Tensor:
        # In the padded image the frame's corner is at (board.top, board.left) at the largest offset up and left.
        top, left = board.top + top, board.left + left
        reach = dark[top : top + height + shifts - 1, left : left + width + shifts - 1]
        return F.avg_pool2d(reach[None, None], (height, width), 1)[0, 0]

    upper, lower = side(0, 0, thick, wide), side(tall - thick, 0, thick, wide)
    left, right = side(0, 0, tall, thick), side(0, wide - thick, tall, thick)
    sides = torch.stack([upper, lower, left, right]).amin(0)
    best = int(sides.argmax())
    return float(sides.flatten()[best]), best // shifts - drift, best % shifts - drift


def _drift(grey: Tensor) -> int:
    return round(DRIFT * lettered_side(*grey.shape))


def _read(grey: Tensor, board: Board, letters: int) -> str:
    drift = _drift(grey)
    glyphs = torch.from_numpy(glyph_atlas(lettered_side(*grey.shape))).to(grey.device)[:, None]
    ink = F.pad(1 - grey, [drift] * 4)
    top, left = max(0, board.top), max(0, board.left)
    cells = torch.stack(
        [
            ink[top : top + board.cell_height + 2 * drift, start : start + board.cell_width + 2 * drift]
            for start in range(left, left + letters * board.cell_width, board.cell_width)
        ]
    )[:, None]
    likeness = normalised_correlation(cells, glyphs).flatten(2).amax(2)
    return "".join(LETTERS[index] for index in likeness.argmax(1))


def normalised_correlation(pictures: Tensor, templates: Tensor) -> Tensor:
    """Returns the normalized correlation of each template at each position of each image, -1 to 1.

    Args:
        pictures: float [n, 1, height, width].
        templates: float [m, 1, template height, template width].

    Returns:
        float [n, m, places down, places across].
    """
    centred = templates - templates.mean((2, 3), keepdim=True)
    centred = centred / centred.square().sum((2, 3), keepdim=True).sqrt()
    window = torch.ones_like(templates[:1])
    count = window.numel()
    total, squares = F.conv2d(pictures, window), F.conv2d(pictures.square(), window)
    spread = (squares - total.square() / count).clamp(min=1e-6).sqrt()
    return F.conv2d(pictures, centred) / spread

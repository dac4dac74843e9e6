"""Where things and signs are on a picture."""

from __future__ import annotations

from typing import Final, NamedTuple

from .scene import SIGN_BAND

CELL_WIDTH, CELL_HEIGHT = 0.145, 0.17
"""Of a letter, in short sides of the picture."""
BORDER: Final = 0.014
"""Of a sign, in short sides of the picture."""


class Frame(NamedTuple):
    """Where things may be, in pixels: all of the picture's width, and its height without its sign's band."""

    top: int
    height: int

    @classmethod
    def of(cls, sign_place: str | None, height: int, width: int) -> Frame:
        """Returns the frame of a picture whose sign is at ``sign_place``; None = it has none."""
        short = min(height, width)
        band = round(SIGN_BAND * short) if sign_place else 0
        return cls(band if sign_place == "top" else 0, height - band)


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

"""Where things and signs are on a picture."""

from __future__ import annotations

from typing import Final, NamedTuple

from .scene import SIGN_BAND

LETTERED_SIDE: Final = 256
"""Letters of pictures with longer sides are as large as on a square of this side, and as far from the edge."""
CELL_WIDTH, CELL_HEIGHT = 0.145, 0.17
"""Of a letter, in short sides of the picture or ``LETTERED_SIDE``, whichever is less."""
BORDER: Final = 0.014
"""Of a sign, likewise."""
CODE_SIDE: Final = 32
"""Of the part of a picture that has one code, in pixels."""


def lettered_side(height: int, width: int) -> int:
    """Returns the side that the letters of a picture are as large as: its short one, up to ``LETTERED_SIDE``."""
    return min(height, width, LETTERED_SIDE)


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
        """Returns where the board is of a word of so many letters: in the middle, give or take half a code's side.

        Where letters don't grow any more, they stand on codes as on a square of ``LETTERED_SIDE``: a letter then has
        the same codes in all such pictures.
        """
        side = lettered_side(height, width)
        cell_height, cell_width = round(CELL_HEIGHT * side), round(CELL_WIDTH * side)
        margin = (round(SIGN_BAND * side) - cell_height) // 2
        top = margin if place == "top" else height - margin - cell_height
        left = (width - letters * cell_width) // 2
        if side == LETTERED_SIDE:
            left -= (width - side) // 2 % CODE_SIDE
        return cls(top, left, cell_height, cell_width, max(1, round(BORDER * side)))

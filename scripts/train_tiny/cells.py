"""Labels and loss weights of an image's cells, each of which has one code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.request import geometry
from glm_image.request.geometry import Size
from train_tiny.world.layout import Board
from train_tiny.world.scene import DIAMETERS, MOST_THINGS
from train_tiny.world.table import NO_THING, Circles, Floats, Integers, Signs, Table

SHOWN_WEIGHT, SMALL_WEIGHT, HELD_WEIGHT = 4.0, 8.0, 12.0
"""Weights of cells that show an object or letter, a small object, an object inside another; the background has 1."""
SMALL_RADIUS = (DIAMETERS["small"] + DIAMETERS["large"]) / 4
"""Objects of a smaller radius, in short sides, are small."""
DECISIVE = 8.0, 4.0
"""Weights in the AR's loss of the cells in the first and second row that an object touches."""


class CellLabels(NamedTuple):
    """The content of each cell, [n, cells].

    Attributes:
        shape: 0 = no object, else 1 + the shape's index.
        colour: as ``shape``.
        letter: 0 = no letter, else 1 + its index.
        background: index of the background's kind.
        held: whether it shows an object inside another.
        place: [n, cells, 3]: offset of the cell's centre from its object's centre, right and down in radii, and the
            radius in short sides; for letters, in letter cells, and 0.
    """

    shape: Tensor
    colour: Tensor
    letter: Tensor
    background: Tensor
    held: Tensor
    place: Tensor


def cell_labels(table: Table, size: Size, cell: int = geometry.PIXELS_PER_TOKEN) -> CellLabels:
    """Returns the labels of the cells, of ``cell`` x ``cell`` pixels, of scenes rendered at a size."""
    grid = size.height // cell, size.width // cell
    shape, colour, letter, background, held = np.zeros((5, table.length, *grid), np.int64)
    background[:] = table.backgrounds[:, None, None]
    place = np.zeros((*shape.shape, 3), np.float32)
    for thing in reversed(range(MOST_THINGS)):
        right, down, nearest, radius = _seen_from(table, thing, size, cell)
        covered = (nearest < 0.8 * radius) & (table.shapes[:, thing] != NO_THING)[:, None, None]  # more than its rim
        row = np.nonzero(covered)[0]
        shape[covered], colour[covered] = 1 + table.shapes[row, thing], 1 + table.colours[row, thing]
        held[covered] = table.inside[row] & (thing == 0)
        whole = np.broadcast_arrays(right / radius, down / radius, radius / min(size))
        place[covered] = np.stack([values[covered] for values in whole], axis=-1)
    for signs in table.signs():
        inside, number, offsets = _cells_of_letters(signs, size, cell)
        letter[signs.rows[:, None], inside] = 1 + signs.letters[:, number]
        shape[signs.rows[:, None], inside] = colour[signs.rows[:, None], inside] = 0
        place[signs.rows[:, None], inside] = offsets
    ids = (torch.from_numpy(values).flatten(1) for values in (shape, colour, letter, background, held))
    return CellLabels(*ids, place=torch.from_numpy(place).flatten(1, 2))


def cell_weights(labels: CellLabels) -> Tensor:
    """Returns the cells' loss weights, fp16 [n, cells].

    Most cells are background, which is learned long before the shape of an object of two cells.
    """
    shown = (labels.shape + labels.letter) > 0
    small = (labels.shape > 0) & (labels.place[..., 2] < SMALL_RADIUS)
    weights = torch.ones_like(shown, dtype=torch.float16)
    for cells, weight in ((shown, SHOWN_WEIGHT), (small, SMALL_WEIGHT), (labels.held > 0, HELD_WEIGHT)):
        weights.masked_fill_(cells, weight)
    return weights


def decision_weights(table: Table, size: Size) -> Tensor:
    """Returns the AR's loss weights of edited scenes' cells, [n, cells]; most are 1.

    Codes are written row by row, so the first cells of an object decide whether it stays. At equal weight these are too
    few to learn which object an edit removes.
    """
    weights = np.ones((table.length, *geometry.target_grid(size)), np.float32)
    for thing in range(MOST_THINGS):
        *_, nearest, radius = _seen_from(table, thing, size, geometry.PIXELS_PER_TOKEN)
        touched = (nearest < radius) & (table.shapes[:, thing] != NO_THING)[:, None, None]
        begun = touched.any(axis=2).cumsum(axis=1)
        for number, value in enumerate(DECISIVE, 1):
            # Rows without contact have the number of the last row with contact.
            decides = touched & (begun == number)[:, :, None]
            weights[decides] = np.maximum(weights[decides], value)
    return torch.from_numpy(weights).flatten(1)


def _centres(size: Size, cell: int) -> tuple[Floats, Floats]:
    # The cells' centres in pixels: [gh, 1] and [1, gw].
    return np.arange(0, size.height, cell)[:, None] + cell / 2, np.arange(0, size.width, cell)[None] + cell / 2


def _seen_from(table: Table, thing: int, size: Size, cell: int) -> tuple[Floats, Floats, Floats, Floats]:
    # Offsets of the cells' centres from an object's, right [n, 1, gw] and down [n, gh, 1]; the distance of their
    # nearest point, [n, gh, gw]; the object's radius, [n, 1, 1].
    half, (y, x) = cell / 2, _centres(size, cell)
    circles = Circles(*(values[:, None, None] for values in table.circles(thing, *size)))
    right, down = x - circles.x, y - circles.y
    nearest = np.hypot(np.maximum(abs(right) - half, 0), np.maximum(abs(down) - half, 0))
    return right, down, nearest, circles.radius


def _cells_of_letters(signs: Signs, size: Size, cell: int) -> tuple[NDArray[np.bool_], Integers, Floats]:
    # The mask of cells with letters, [gh, gw]; for each such cell the letter's index and the offset in it, [cells, 3].
    length, (y, x) = signs.letters.shape[1], _centres(size, cell)
    board = Board.of(length, signs.place, *size)
    along, down = (x - board.left) / board.cell_width, (y - board.top) / board.cell_height
    inside = (along > 0) & (along < length) & (down > -0.2) & (down < 1.2)
    number = np.clip(np.floor(along), 0, length - 1).astype(np.int64)
    offsets = np.stack(np.broadcast_arrays(along - number - 0.5, down - 0.5, 0.0), axis=-1)
    return inside, np.broadcast_to(number, inside.shape)[inside], offsets[inside]

"""What each cell of a picture shows, the part that has one code, and how much it counts in training."""

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
"""Of a cell that shows a thing or a letter, a small thing, a small one inside another; of the background it is 1."""
SMALL_RADIUS = (DIAMETERS["small"] + DIAMETERS["large"]) / 4
"""In short sides: things of a smaller radius are small."""
DECISIVE = 8.0, 4.0
"""In the AR's loss: the weights of cells in the first and the second row that a thing touches."""


class CellLabels(NamedTuple):
    """What each cell shows, for a number of scenes: [n, cells].

    Attributes:
        shape: 0 = no thing, else 1 + the shape's index.
        colour: as ``shape``.
        letter: 0 = no letter, else 1 + its index.
        background: index of the background's kind.
        held: whether it shows a thing that is inside another.
        place: [n, cells, 3]: how far the cell's centre is from its thing's centre, in radii, right and down, and the
            radius in short sides; of letters, in cells of a letter, and 0.
    """

    shape: Tensor
    colour: Tensor
    letter: Tensor
    background: Tensor
    held: Tensor
    place: Tensor


def cell_labels(table: Table, size: Size, cell: int = geometry.PIXELS_PER_TOKEN) -> CellLabels:
    """Tells what the cells of scenes drawn at a size show, ``cell`` pixels wide and high each."""
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
    """How much cells count that show what ``labels`` say, fp16 [n, cells].

    Most cells are background, which is learned long before the shape of a thing of two cells.
    """
    shown = (labels.shape + labels.letter) > 0
    small = (labels.shape > 0) & (labels.place[..., 2] < SMALL_RADIUS)
    weights = torch.ones_like(shown, dtype=torch.float16)
    for cells, weight in ((shown, SHOWN_WEIGHT), (small, SMALL_WEIGHT), (labels.held > 0, HELD_WEIGHT)):
        weights.masked_fill_(cells, weight)
    return weights


def decision_weights(table: Table, size: Size) -> Tensor:
    """How much the cells of pictures count that come of these scenes by edits, [n, cells]; most count 1.

    Codes are written row by row, so whether a thing stays is decided where it begins: in one cell of many, by a thing
    that lies mostly below. Counted as all others, these are too few to learn from which thing is to go.
    """
    weights = np.ones((table.length, *geometry.target_grid(size)), np.float32)
    for thing in range(MOST_THINGS):
        *_, nearest, radius = _seen_from(table, thing, size, geometry.PIXELS_PER_TOKEN)
        touched = (nearest < radius) & (table.shapes[:, thing] != NO_THING)[:, None, None]
        begun = touched.any(axis=2).cumsum(axis=1)
        for number, value in enumerate(DECISIVE, 1):
            # A row that it does not touch has the number of the last one that it does.
            decides = touched & (begun == number)[:, :, None]
            weights[decides] = np.maximum(weights[decides], value)
    return torch.from_numpy(weights).flatten(1)


def _centres(size: Size, cell: int) -> tuple[Floats, Floats]:
    # Of cells, in pixels: [gh, 1] and [1, gw].
    return np.arange(0, size.height, cell)[:, None] + cell / 2, np.arange(0, size.width, cell)[None] + cell / 2


def _seen_from(table: Table, thing: int, size: Size, cell: int) -> tuple[Floats, Floats, Floats, Floats]:
    # How far the cells' centres are from a thing's, right [n, 1, gw] and down [n, gh, 1], how far their nearest point
    # [n, gh, gw], and its radius [n, 1, 1].
    half, (y, x) = cell / 2, _centres(size, cell)
    circles = Circles(*(values[:, None, None] for values in table.circles(thing, *size)))
    right, down = x - circles.x, y - circles.y
    nearest = np.hypot(np.maximum(abs(right) - half, 0), np.maximum(abs(down) - half, 0))
    return right, down, nearest, circles.radius


def _cells_of_letters(signs: Signs, size: Size, cell: int) -> tuple[NDArray[np.bool_], Integers, Floats]:
    # The cells [gh, gw] with letters; of each of these, the letter's number, and where the cell is in it, [cells, 3].
    length, (y, x) = signs.letters.shape[1], _centres(size, cell)
    board = Board.of(length, signs.place, *size)
    along, down = (x - board.left) / board.cell_width, (y - board.top) / board.cell_height
    inside = (along > 0) & (along < length) & (down > -0.2) & (down < 1.2)
    number = np.clip(np.floor(along), 0, length - 1).astype(np.int64)
    offsets = np.stack(np.broadcast_arrays(along - number - 0.5, down - 0.5, 0.0), axis=-1)
    return inside, np.broadcast_to(number, inside.shape)[inside], offsets[inside]

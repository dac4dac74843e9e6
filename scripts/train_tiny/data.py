"""Pictures of the world on the device, sampled ahead of training: sizes, scenes, captions and what each cell shows."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glm_image import geometry, prompts
from glm_image.geometry import Grid, Size
from train_tiny.world.caption import caption
from train_tiny.world.draw import draw
from train_tiny.world.edits import Edit, sample_edit, sample_removals
from train_tiny.world.layout import Board
from train_tiny.world.scene import MOST_THINGS, Scene, sample_scene
from train_tiny.world.table import NO_THING, Circles, Floats, Integers, Signs, Table

MAIN_SIZE = Size(256, 256)
OTHER_SIZES = tuple(
    Size(*size)
    for size in (
        (128, 128), (160, 224), (192, 192), (192, 256), (256, 192), (224, 320), (320, 224), (256, 384), (384, 256),
        (320, 320), (256, 512), (512, 256), (384, 384), (512, 512),
    )
)  # fmt: skip
"""Height and width."""
ENGLISH = 0.65
EDIT_WEIGHTS = {"recolour": 2.0, "move": 1.5, "add": 1.5, "remove": 2.5, "background": 1.0, "word": 1.0}
"""How often each kind of edit is drawn, of removals all that a scene allows: which thing is to go is learned last."""
DECISIVE = 8.0, 4.0
"""In the AR's loss: the weights of cells in the first and the second row that a thing touches."""
PIXELS_AT_ONCE = 4096 * 256 * 256
CHUNK = 500


class Item(NamedTuple):
    """What a picture shows, its prompt, and for an edit what the source shows."""

    scene: Scene
    prompt: str
    source: Scene | None = None


def _items(job: tuple[int, int, int, bool]) -> list[Item]:
    seed, chunk, count, edits = job
    rng = Random(f"{seed} {chunk} {edits}")
    if edits:
        return [Item(edit.after, edit.instruction, edit.before) for edit in islice(_edits(rng), count)]
    scenes = (sample_scene(rng) for _ in range(count))
    return [Item(scene, caption(scene, rng, "en" if rng.random() < ENGLISH else "zh")) for scene in scenes]


def _edits(rng: Random) -> Iterator[Edit]:
    while True:
        (kind,) = rng.choices(list(EDIT_WEIGHTS), list(EDIT_WEIGHTS.values()))
        # All removals from a scene, or the AR learns by heart which thing is gone afterwards.
        yield from sample_removals(rng) if kind == "remove" else [sample_edit(rng, kind=kind)]


def sample_items(count: int, seed: int, *, edits: bool = False) -> list[Item]:
    """Samples scenes with captions, or edits, in as many processes as there are cores; the same whatever their number.

    To be called before the device is first used: processes are forked.
    """
    jobs = [(seed, start, min(CHUNK, count - start), edits) for start in range(0, count, CHUNK)]
    with multiprocessing.get_context("fork").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        return [item for items in pool.map(_items, jobs, chunksize=1) for item in items]


def by_size(items: Sequence[Item], main_share: float) -> Iterator[tuple[Size, Sequence[Item]]]:
    """Deals items out to the sizes: ``main_share`` to the main one, as many to each of the others, if there are any."""
    start = round(len(items) * main_share)
    if start:
        yield MAIN_SIZE, items[:start]
    bounds = np.linspace(start, len(items), len(OTHER_SIZES) + 1).astype(int)
    for size, first, last in zip(OTHER_SIZES, bounds, bounds[1:], strict=False):
        if last > first:
            yield size, items[first:last]


def drawn(scenes: Sequence[Scene], size: Size, device: torch.device) -> Iterator[Tensor]:
    """Draws scenes, as many at a time as have ``PIXELS_AT_ONCE``: uint8 [n, 3, height, width]."""
    count = PIXELS_AT_ONCE // (size.height * size.width)
    for start in range(0, len(scenes), count):
        yield draw(scenes[start : start + count], size.height, size.width, device)


def halved(pictures: Tensor) -> Tensor:
    """What the vision tower sees of uint8 pictures, as the image processor scales them; uint8."""
    rows, columns = (halving(side, pictures.device) for side in pictures.shape[-2:])
    return (rows @ pictures.double() @ columns.T).clamp(0, 255).round().to(torch.uint8)


@lru_cache(maxsize=32)
def halving(side: int, device: torch.device) -> Tensor:
    """The matrix [side / 2, side] that halves one side, bicubic with antialiasing.

    On a GPU torch's own interpolation goes through a batch one picture after another. In fp64, which no product
    rounds to TF32.
    """
    each = torch.eye(side, device=device, dtype=torch.float64)[None, None]
    return F.interpolate(each, scale_factor=(0.5, 1.0), mode="bicubic", antialias=True)[0, 0]


def small_pictures(scenes: Sequence[Scene], grid: Grid, device: torch.device, *, preview: bool) -> Iterator[Tensor]:
    """Draws scenes for the vision tower: uint8 [n, 3, 16 gh, 16 gw].

    A preview is drawn as large as it is seen; another picture at its own size, and halved.
    """
    size = geometry.painted_size(grid)
    if preview:
        yield from drawn(scenes, Size(size.height // 2, size.width // 2), device)
    else:
        yield from (halved(pictures) for pictures in drawn(scenes, size, device))


class Choice:
    """Chooses among groups of samples, each as often as it has samples, and rows of the one chosen."""

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._counts = np.asarray(counts)
        self._shares = self._counts / self._counts.sum()

    def group(self) -> int:
        """Chooses a group."""
        return int(self._rng.choice(len(self._counts), p=self._shares))

    def rows(self, group: int, count: int, device: torch.device) -> Tensor:
        """Chooses rows of a group, int64 [count]."""
        return torch.randint(int(self._counts[group]), (count,), device=device)


def glyph_rows(prompt: str) -> tuple[tuple[int, ...], ...]:
    """The byte tokens of the quoted strings, as ``glm_image.prompts.glyph_token_ids`` gives them."""
    strings = prompts.quoted_strings(prompt) or [""]
    pads = (0,) * ((len(strings) + 1) % 2)
    return tuple((*pads, *(byte + 3 for byte in string.encode()), 1) for string in strings)


def common(keys: Sequence[tuple[int, ...]], at_least: int) -> set[tuple[int, ...]]:
    """The keys that come ``at_least`` times."""
    return {key for key, count in Counter(keys).items() if count >= at_least}


class CellLabels(NamedTuple):
    """What each cell of 32x32 pixels shows, for a number of scenes: [n, cells].

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


def cell_labels(scenes: Sequence[Scene], size: Size) -> CellLabels:
    """Tells what the cells of scenes drawn at a size show."""
    table, grid = Table.of(scenes), geometry.target_grid(size)
    shape, colour, letter, background, held = np.zeros((5, len(scenes), *grid), np.int64)
    background[:] = table.backgrounds[:, None, None]
    place = np.zeros((*shape.shape, 3), np.float32)
    for thing in reversed(range(MOST_THINGS)):
        right, down, nearest, radius = _seen_from(table, thing, size)
        covered = (nearest < 0.8 * radius) & (table.shapes[:, thing] != NO_THING)[:, None, None]  # more than its rim
        row = np.nonzero(covered)[0]
        shape[covered], colour[covered] = 1 + table.shapes[row, thing], 1 + table.colours[row, thing]
        held[covered] = table.inside[row] & (thing == 0)
        whole = np.broadcast_arrays(right / radius, down / radius, radius / min(size))
        place[covered] = np.stack([values[covered] for values in whole], axis=-1)
    for signs in table.signs():
        inside, number, offsets = _cells_of_letters(signs, size)
        letter[signs.rows[:, None], inside] = 1 + signs.letters[:, number]
        shape[signs.rows[:, None], inside] = colour[signs.rows[:, None], inside] = 0
        place[signs.rows[:, None], inside] = offsets
    ids = (torch.from_numpy(values).flatten(1) for values in (shape, colour, letter, background, held))
    return CellLabels(*ids, place=torch.from_numpy(place).flatten(1, 2))


def decision_weights(scenes: Sequence[Scene], size: Size) -> Tensor:
    """How much the cells of pictures count that come of these scenes by edits, [n, cells]; most count 1.

    Codes are written row by row, so whether a thing stays is decided where it begins: in one cell of many, by a thing
    that lies mostly below. Counted as all others, these are too few to learn from which thing is to go.
    """
    table = Table.of(scenes)
    weights = np.ones((len(scenes), *geometry.target_grid(size)), np.float32)
    for thing in range(MOST_THINGS):
        *_, nearest, radius = _seen_from(table, thing, size)
        touched = (nearest < radius) & (table.shapes[:, thing] != NO_THING)[:, None, None]
        begun = touched.any(axis=2).cumsum(axis=1)
        for number, value in enumerate(DECISIVE, 1):
            # A row that it does not touch has the number of the last one that it does.
            decides = touched & (begun == number)[:, :, None]
            weights[decides] = np.maximum(weights[decides], value)
    return torch.from_numpy(weights).flatten(1)


def _centres(size: Size) -> tuple[Floats, Floats]:
    # Of cells, in pixels: [gh, 1] and [1, gw].
    cell = geometry.PIXELS_PER_TOKEN
    return np.arange(0, size.height, cell)[:, None] + cell / 2, np.arange(0, size.width, cell)[None] + cell / 2


def _seen_from(table: Table, thing: int, size: Size) -> tuple[Floats, Floats, Floats, Floats]:
    # How far the cells' centres are from a thing's, right [n, 1, gw] and down [n, gh, 1], how far their nearest point
    # [n, gh, gw], and its radius [n, 1, 1].
    half, (y, x) = geometry.PIXELS_PER_TOKEN / 2, _centres(size)
    circles = Circles(*(values[:, None, None] for values in table.circles(thing, *size)))
    right, down = x - circles.x, y - circles.y
    nearest = np.hypot(np.maximum(abs(right) - half, 0), np.maximum(abs(down) - half, 0))
    return right, down, nearest, circles.radius


def _cells_of_letters(signs: Signs, size: Size) -> tuple[NDArray[np.bool_], Integers, Floats]:
    # The cells [gh, gw] with letters; of each of these, the letter's number, and where the cell is in it, [cells, 3].
    length, (y, x) = signs.letters.shape[1], _centres(size)
    board = Board.of(length, signs.place, *size)
    along, down = (x - board.left) / board.cell_width, (y - board.top) / board.cell_height
    inside = (along > 0) & (along < length) & (down > -0.2) & (down < 1.2)
    number = np.clip(np.floor(along), 0, length - 1).astype(np.int64)
    offsets = np.stack(np.broadcast_arrays(along - number - 0.5, down - 0.5, 0.0), axis=-1)
    return inside, np.broadcast_to(number, inside.shape)[inside], offsets[inside]

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
from train_tiny.world.draw import Board, Frame, draw
from train_tiny.world.edits import Edit, sample_edit, sample_removals
from train_tiny.world.scene import Scene, sample_scene
from train_tiny.world.vocabulary import BACKGROUNDS, COLOURS, LETTERS, SHAPES

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


SHAPE_IDS, COLOUR_IDS = ({name: 1 + n for n, name in enumerate(names)} for names in (SHAPES, COLOURS))


def cell_labels(scenes: Sequence[Scene], size: Size) -> CellLabels:
    """Tells what the cells of scenes drawn at a size show."""
    rows = [_labels(scene, size) for scene in scenes]
    ids = torch.from_numpy(np.stack([row[0] for row in rows])).long()
    return CellLabels(*ids.unbind(1), place=torch.from_numpy(np.stack([row[1] for row in rows])))


def decision_weights(scenes: Sequence[Scene], size: Size) -> Tensor:
    """How much the cells of pictures count that come of these scenes by edits, [n, cells]; most count 1.

    Codes are written row by row, so whether a thing stays is decided where it begins: in one cell of many, by a thing
    that lies mostly below. Counted as all others, these are too few to learn from which thing is to go.
    """
    weights = np.ones((len(scenes), *geometry.target_grid(size)), np.float32)
    for weight, scene in zip(weights, scenes, strict=True):
        frame = Frame.of(scene.sign.place if scene.sign else None, *size)
        for index in range(len(scene.things)):
            *_, nearest, radius = _seen_from(scene, index, frame, size)
            touched = nearest < radius
            for row, value in zip(np.flatnonzero(touched.any(axis=1)), DECISIVE, strict=False):
                weight[row] = np.where(touched[row], np.maximum(weight[row], value), weight[row])
    return torch.from_numpy(weights).flatten(1)


def _seen_from(
    scene: Scene, index: int, frame: Frame, size: Size
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    # How far the cells' centres are from a thing's, right and down, how far their nearest point, and its radius.
    cell, thing = geometry.PIXELS_PER_TOKEN, scene.things[index]
    right = np.arange(0, size.width, cell)[None] + cell / 2 - thing.x * frame.width
    down = np.arange(0, size.height, cell)[:, None] + cell / 2 - frame.top - thing.y * frame.height
    nearest = np.hypot(np.maximum(abs(right) - cell / 2, 0), np.maximum(abs(down) - cell / 2, 0))
    return right, down, nearest, scene.diameter(index) * frame.short / 2


def _labels(scene: Scene, size: Size) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    cell = geometry.PIXELS_PER_TOKEN
    y = np.arange(0, size.height, cell)[:, None] + cell / 2
    x = np.arange(0, size.width, cell)[None] + cell / 2
    ids = np.zeros((5, *geometry.target_grid(size)), np.int8)
    place = np.zeros((*geometry.target_grid(size), 3), np.float32)
    ids[3] = BACKGROUNDS.index(scene.background.kind)
    frame = Frame.of(scene.sign.place if scene.sign else None, *size)
    for index, thing in reversed(list(enumerate(scene.things))):
        right, down, nearest, radius = _seen_from(scene, index, frame, size)
        covered = nearest < 0.8 * radius  # more than its rim
        ids[0][covered], ids[1][covered] = SHAPE_IDS[thing.shape], COLOUR_IDS[thing.colour]
        ids[4][covered] = scene.relation == "inside" and index == 0
        whole = np.broadcast_arrays(right / radius, down / radius, radius / frame.short)
        place[covered] = np.stack(whole, axis=-1)[covered]
    if scene.sign:
        word = scene.sign.word
        board = Board.of(len(word), scene.sign.place, *size)
        along, down = (x - board.left) / board.cell_width, (y - board.top) / board.cell_height
        inside = (along > 0) & (along < len(word)) & (down > -0.2) & (down < 1.2)
        letters = 1 + np.array([LETTERS.index(letter) for letter in word])
        number = np.clip(np.floor(along), 0, len(word) - 1).astype(int)
        ids[2][inside] = np.broadcast_to(letters[number], inside.shape)[inside]
        ids[:2, inside] = 0
        offsets = np.broadcast_arrays(along - number - 0.5, down - 0.5, 0.0)
        place[inside] = np.stack(offsets, axis=-1)[inside]
    return ids.reshape(len(ids), -1), place.reshape(-1, 3)

"""Samples scenes with captions and edits before training, and renders them on the device."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, product
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glm_image.request import geometry, prompts
from glm_image.request.geometry import Grid, Size
from train_tiny.world.caption import caption
from train_tiny.world.draw import draw
from train_tiny.world.edits import Edit, sample_edit, sample_removals
from train_tiny.world.paraphrase import paraphrased
from train_tiny.world.scene import sample_scene
from train_tiny.world.table import Integers, Table

MAIN_SIZE = Size(256, 256)
SIDES = range(128, 513, 32)
"""The side lengths of images."""
OTHER_SIZES = tuple(Size(*sides) for sides in product(SIDES, SIDES) if sides != MAIN_SIZE)


def _spread_sizes() -> Iterator[Size]:
    for short in SIDES:
        # Rounded up to an existing side.
        half_as_long_again = min(math.ceil(1.5 * short / SIDES.step) * SIDES.step, SIDES[-1])
        for long in {short, half_as_long_again}:
            yield from {Size(short, long), Size(long, short)} - {MAIN_SIZE}
    yield from (Size(256, 512), Size(512, 256))


SPREAD_SIZES = tuple(sorted(_spread_sizes()))
"""Square, wide and tall sizes for every short side, for stages that capture a graph per size."""
ENGLISH = 0.65
EDIT_WEIGHTS = {"recolour": 2.0, "move": 1.5, "add": 1.5, "remove": 2.5, "background": 1.0, "word": 1.0}
"""Sampling weights of the kinds of edits. A removal yields all removals of a scene, as these are learned last."""
PIXELS_PER_BATCH = 8192 * 256 * 256
"""Pixels rendered per batch; in smaller batches launches dominate."""
CHUNK = 500


class Samples(NamedTuple):
    """Scenes and their prompts: captions, or instructions of edits.

    Attributes:
        scenes: the target images, one row each.
        prompts: one per scene.
        sources: the images to edit, one row each; None for captions.
    """

    scenes: Table
    prompts: list[str]
    sources: Table | None = None

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Concatenates samples of one kind."""
        sources = [part.sources for part in parts if part.sources is not None]
        prompts = [prompt for part in parts for prompt in part.prompts]
        return cls(Table.joined([part.scenes for part in parts]), prompts, Table.joined(sources) if sources else None)

    def rows(self, chosen: slice | Integers) -> Samples:
        """Returns the chosen samples."""
        prompts = self.prompts[chosen] if isinstance(chosen, slice) else [self.prompts[row] for row in chosen]
        return Samples(self.scenes.rows(chosen), prompts, None if self.sources is None else self.sources.rows(chosen))


def _sampled(job: tuple[str, int, int, bool]) -> Samples:
    seed, chunk, count, edits = job
    rng = Random(f"{seed} {chunk} {edits}")
    if edits:
        edits_found = list(islice(_edits(rng), count))
        before, after = Table.of([edit.before for edit in edits_found]), Table.of([edit.after for edit in edits_found])
        return Samples(after, [paraphrased(edit.instruction, rng) for edit in edits_found], before)
    scenes, captions = [], []
    for _ in range(count):
        scenes.append(sample_scene(rng))
        language = "en" if rng.random() < ENGLISH else "zh"
        captions.append(paraphrased(caption(scenes[-1], rng, language), rng))
    return Samples(Table.of(scenes), captions)


def _edits(rng: Random) -> Iterator[Edit]:
    while True:
        (kind,) = rng.choices(list(EDIT_WEIGHTS), list(EDIT_WEIGHTS.values()))
        # All removals of a scene; with a single one the AR memorizes which object is missing.
        yield from sample_removals(rng) if kind == "remove" else [sample_edit(rng, kind=kind)]


def sample(count: int, seed: int | str, *, edits: bool = False) -> Samples:
    """Samples scenes with captions, or edits, with one process per core; the result does not depend on their number.

    Must be called before the device is first used, as it forks.
    """
    jobs = [(str(seed), start, min(CHUNK, count - start), edits) for start in range(0, count, CHUNK)]
    with multiprocessing.get_context("fork").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        return Samples.joined(pool.map(_sampled, jobs, chunksize=1))


def by_size(samples: Samples, main_share: float, others: Sequence[Size]) -> Iterator[tuple[Size, Samples]]:
    """Assigns samples to sizes: ``main_share`` to the main size, the rest evenly to the others."""
    count = samples.scenes.length
    start = round(count * main_share)
    if start:
        yield MAIN_SIZE, samples.rows(slice(start))
    bounds = np.linspace(start, count, len(others) + 1).astype(int)
    for size, first, last in zip(others, bounds, bounds[1:], strict=False):
        if last > first:
            yield size, samples.rows(slice(first, last))


def render(scenes: Table, size: Size, device: torch.device) -> Iterator[Tensor]:
    """Renders scenes in batches of ``PIXELS_PER_BATCH``: uint8 [n, 3, height, width]."""
    count = PIXELS_PER_BATCH // (size.height * size.width)
    for start in range(0, scenes.length, count):
        yield draw(scenes.rows(slice(start, start + count)), size.height, size.width, device)


def halved(pictures: Tensor) -> Tensor:
    """Returns uint8 images at half size, as the image processor scales them for the vision tower; uint8."""
    rows, columns = (halving(side, pictures.device) for side in pictures.shape[-2:])
    return (rows @ pictures.double() @ columns.T).clamp(0, 255).round().to(torch.uint8)


@lru_cache(maxsize=32)
def halving(side: int, device: torch.device) -> Tensor:
    """Returns the matrix [side / 2, side] of bicubic antialiased halving.

    torch's interpolation processes a batch sequentially on a GPU. fp64 avoids rounding to TF32.
    """
    identity = torch.eye(side, device=device, dtype=torch.float64)[None, None]
    return F.interpolate(identity, scale_factor=(0.5, 1.0), mode="bicubic", antialias=True)[0, 0]


def render_size(grid: Grid, *, preview: bool) -> Size:
    """Returns the size at which images of a grid are rendered; a preview's is half of another's."""
    size = geometry.rendered_size(grid)
    return Size(size.height // 2, size.width // 2) if preview else size


def small_pictures(scenes: Table, grid: Grid, device: torch.device, *, preview: bool) -> Iterator[Tensor]:
    """Renders scenes for the vision tower; other than previews, at half size: uint8 [n, 3, 16 gh, 16 gw]."""
    pictures = render(scenes, render_size(grid, preview=preview), device)
    yield from pictures if preview else map(halved, pictures)


class Choice:
    """Samples a group in proportion to its size, and rows of a group."""

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._counts = np.asarray(counts)
        self._shares = self._counts / self._counts.sum()

    def group(self) -> int:
        return int(self._rng.choice(len(self._counts), p=self._shares))

    def rows(self, group: int, count: int, device: torch.device) -> Tensor:
        """Samples rows of a group, int64 [count]."""
        return torch.randint(int(self._counts[group]), (count,), device=device)


def glyph_rows(prompt: str) -> tuple[tuple[int, ...], ...]:
    """Returns the byte tokens of the quoted strings, as ``glm_image.request.prompts.glyph_token_ids`` does."""
    strings = prompts.quoted_strings(prompt) or [""]
    pads = (0,) * ((len(strings) + 1) % 2)
    return tuple((*pads, *(byte + 3 for byte in string.encode()), 1) for string in strings)


def common(keys: Sequence[tuple[int, ...]], at_least: int) -> set[tuple[int, ...]]:
    """Returns the keys that occur at least ``at_least`` times."""
    return {key for key, count in Counter(keys).items() if count >= at_least}

"""Pictures of the world on the device, sampled ahead of training: sizes, scenes, captions."""

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
"""Of all pictures that there are."""
OTHER_SIZES = tuple(Size(*sides) for sides in product(SIDES, SIDES) if sides != MAIN_SIZE)


def _spread_sizes() -> Iterator[Size]:
    for short in SIDES:
        # Rounded up to a side that there is.
        half_as_long_again = min(math.ceil(1.5 * short / SIDES.step) * SIDES.step, SIDES[-1])
        for long in {short, half_as_long_again}:
            yield from {Size(short, long), Size(long, short)} - {MAIN_SIZE}
    yield from (Size(256, 512), Size(512, 256))


SPREAD_SIZES = tuple(sorted(_spread_sizes()))
"""Square, wide and tall ones of every short side, for stages that capture batches of each size."""
ENGLISH = 0.65
EDIT_WEIGHTS = {"recolour": 2.0, "move": 1.5, "add": 1.5, "remove": 2.5, "background": 1.0, "word": 1.0}
"""How often each kind of edit is drawn, of removals all that a scene allows: which thing is to go is learned last."""
PIXELS_AT_ONCE = 8192 * 256 * 256
"""Drawn together: of few pictures the launches take longer than their work."""
CHUNK = 500


class Samples(NamedTuple):
    """What pictures show, and their prompts: of captions, or of edits.

    Attributes:
        scenes: what is to be painted, a row each.
        prompts: as many.
        sources: what is edited, a row each; None = nothing is.
    """

    scenes: Table
    prompts: list[str]
    sources: Table | None = None

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Puts samples of one kind one after the other."""
        sources = [part.sources for part in parts if part.sources is not None]
        prompts = [prompt for part in parts for prompt in part.prompts]
        return cls(Table.joined([part.scenes for part in parts]), prompts, Table.joined(sources) if sources else None)

    def rows(self, chosen: slice | Integers) -> Samples:
        """Returns some of the samples."""
        prompts = self.prompts[chosen] if isinstance(chosen, slice) else [self.prompts[row] for row in chosen]
        return Samples(self.scenes.rows(chosen), prompts, None if self.sources is None else self.sources.rows(chosen))


def _sampled(job: tuple[str, int, int, bool]) -> Samples:
    seed, chunk, count, edits = job
    rng = Random(f"{seed} {chunk} {edits}")
    if edits:
        found = list(islice(_edits(rng), count))
        before, after = Table.of([edit.before for edit in found]), Table.of([edit.after for edit in found])
        return Samples(after, [paraphrased(edit.instruction, rng) for edit in found], before)
    scenes, captions = [], []
    for _ in range(count):
        scenes.append(sample_scene(rng))
        language = "en" if rng.random() < ENGLISH else "zh"
        captions.append(paraphrased(caption(scenes[-1], rng, language), rng))
    return Samples(Table.of(scenes), captions)


def _edits(rng: Random) -> Iterator[Edit]:
    while True:
        (kind,) = rng.choices(list(EDIT_WEIGHTS), list(EDIT_WEIGHTS.values()))
        # All removals from a scene, or the AR learns by heart which thing is gone afterwards.
        yield from sample_removals(rng) if kind == "remove" else [sample_edit(rng, kind=kind)]


def sample(count: int, seed: int | str, *, edits: bool = False) -> Samples:
    """Samples scenes with captions, or edits, in as many processes as there are cores; the same whatever their number.

    To be called before the device is first used: processes are forked.
    """
    jobs = [(str(seed), start, min(CHUNK, count - start), edits) for start in range(0, count, CHUNK)]
    with multiprocessing.get_context("fork").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        return Samples.joined(pool.map(_sampled, jobs, chunksize=1))


def by_size(samples: Samples, main_share: float, others: Sequence[Size]) -> Iterator[tuple[Size, Samples]]:
    """Deals samples out to sizes: ``main_share`` to the main one, as many to each other, if there are any."""
    count = samples.scenes.length
    start = round(count * main_share)
    if start:
        yield MAIN_SIZE, samples.rows(slice(start))
    bounds = np.linspace(start, count, len(others) + 1).astype(int)
    for size, first, last in zip(others, bounds, bounds[1:], strict=False):
        if last > first:
            yield size, samples.rows(slice(first, last))


def drawn(scenes: Table, size: Size, device: torch.device) -> Iterator[Tensor]:
    """Draws scenes, as many at a time as have ``PIXELS_AT_ONCE``: uint8 [n, 3, height, width]."""
    count = PIXELS_AT_ONCE // (size.height * size.width)
    for start in range(0, scenes.length, count):
        yield draw(scenes.rows(slice(start, start + count)), size.height, size.width, device)


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


def drawn_size(grid: Grid, *, preview: bool) -> Size:
    """The size at which pictures of a grid are drawn: of a preview that at which it is seen, half of another's."""
    size = geometry.painted_size(grid)
    return Size(size.height // 2, size.width // 2) if preview else size


def small_pictures(scenes: Table, grid: Grid, device: torch.device, *, preview: bool) -> Iterator[Tensor]:
    """Draws scenes for the vision tower, and halves those that are no previews: uint8 [n, 3, 16 gh, 16 gw]."""
    pictures = drawn(scenes, drawn_size(grid, preview=preview), device)
    yield from pictures if preview else map(halved, pictures)


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
    """The byte tokens of the quoted strings, as ``glm_image.request.prompts.glyph_token_ids`` gives them."""
    strings = prompts.quoted_strings(prompt) or [""]
    pads = (0,) * ((len(strings) + 1) % 2)
    return tuple((*pads, *(byte + 3 for byte in string.encode()), 1) for string in strings)


def common(keys: Sequence[tuple[int, ...]], at_least: int) -> set[tuple[int, ...]]:
    """The keys that come ``at_least`` times."""
    return {key for key, count in Counter(keys).items() if count >= at_least}

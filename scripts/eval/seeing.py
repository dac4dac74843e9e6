"""Recognizes the contents of a rendered scene from its pixels."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.reading import read_sign
from train_tiny.world.draw import draw
from train_tiny.world.layout import Frame
from train_tiny.world.scene import Background, Scene, Sign, Thing
from train_tiny.world.shapes import CREAM, DARK, WOOD
from train_tiny.world.vocabulary import BACKGROUND_COLOURS, BACKGROUNDS, COLOURS, SHAPES

FIT_SIDE: Final = 64
"""The short side at which backgrounds are compared."""
FIT_OUTLIER: Final = 0.25
"""Distances of pixels from a background, in RGB from 0 to 1, are clipped here."""
PATTERN_PENALTY: Final = 0.015
"""Minimum improvement of two colours over one for a gradient."""
WORK_SIDE: Final = 128
"""The short side at which objects are detected."""
THIN: Final = 1
"""Half the width, in pixels, of lines that count as edges."""
LEAST_AREA: Final = 0.0085
"""Minimum area of an object, in squares of the short side; smaller areas are details such as a door."""
TEMPLATE: Final = 48
ASPECT_WEIGHT: Final = 0.4
LARGE_ABOVE: Final = 0.265
"""The extent, in short sides, above which an object is large."""


@dataclass(frozen=True)
class SeenThing:
    """A detected object.

    Attributes:
        shape: the most alike of ``SHAPES``.
        colour: the nearest of ``COLOURS``.
        left: its left end, as a share of the picture's width.
        top: its upper end, as a share of the height that a sign leaves free.
        right: likewise.
        bottom: likewise.
        extent: from end to end, in short sides.
    """

    shape: str
    colour: str
    left: float
    top: float
    right: float
    bottom: float
    extent: float

    @property
    def x(self) -> float:
        """The centre, as a share of the image's width."""
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        """The centre, as a share of the height without a sign."""
        return (self.top + self.bottom) / 2

    @property
    def size(self) -> str:
        """One of ``SIZES``."""
        return "large" if self.extent > LARGE_ABOVE else "small"

    def holds(self, other: SeenThing) -> bool:
        """Whether ``other`` is smaller and its centre is inside."""
        inside = self.left < other.x < self.right and self.top < other.y < self.bottom
        return inside and other.extent < self.extent


@dataclass(frozen=True)
class Seen:
    """The contents of an image."""

    things: tuple[SeenThing, ...]
    background: Background
    sign: Sign | None


def look(pixels: NDArray[np.uint8]) -> Seen:
    """Recognizes the contents of an image.

    Args:
        pixels: uint8 [height, width, 3].
    """
    picture = torch.tensor(pixels).permute(2, 0, 1).float() / 255
    sign = read_sign(picture)
    height, width = picture.shape[1:]
    frame = Frame.of(sign.place if sign else None, height, width)
    background, behind = _background(picture, frame)
    rows = slice(frame.top, frame.top + frame.height)
    return Seen(_things(picture[:, rows], behind[:, rows], min(height, width)), background, sign)


def _background(picture: Tensor, frame: Frame) -> tuple[Background, Tensor]:
    """Returns the best-matching background, and its image, float [3, height, width]."""
    height, width = picture.shape[1:]
    fitted = _shrunk(picture, FIT_SIDE)
    candidates, drawn = _candidates(*fitted.shape[1:])
    scale = fitted.shape[1] / height
    rows = slice(math.ceil(frame.top * scale), math.floor((frame.top + frame.height) * scale))
    distance = (drawn[:, :, rows] - fitted[None, :, rows]).square().sum(1).sqrt()
    misfit = distance.clamp(max=FIT_OUTLIER).mean((1, 2))
    misfit += torch.tensor([0.0 if candidate.kind == "plain" else PATTERN_PENALTY for candidate in candidates])
    best = int(misfit.argmin())
    return candidates[best], _picture_of(Scene((), background=candidates[best]), height, width)


@lru_cache(maxsize=8)
def _candidates(height: int, width: int) -> tuple[list[Background], Tensor]:
    pairs = list(itertools.permutations(BACKGROUND_COLOURS, 2))
    candidates = [Background("plain", (colour,)) for colour in BACKGROUND_COLOURS]
    candidates += [Background(kind, pair) for kind in BACKGROUNDS[1:] for pair in pairs]
    return candidates, draw([Scene((), background=behind) for behind in candidates], height, width).float() / 255


def _picture_of(scene: Scene, height: int, width: int) -> Tensor:
    return draw([scene], height, width)[0].float() / 255


def _shrunk(picture: Tensor, side: int) -> Tensor:
    """Returns the image with its short side reduced to ``side``, if it is longer."""
    height, width = picture.shape[1:]
    scale = min(1.0, side / min(height, width))
    to = (round(height * scale), round(width * scale))
    return F.interpolate(picture[None], to, mode="area")[0]


def _things(picture: Tensor, behind: Tensor, short: int) -> tuple[SeenThing, ...]:
    scale = min(1.0, WORK_SIDE / short)
    size = (round(picture.shape[1] * scale), round(picture.shape[2] * scale))
    picture, behind = (F.interpolate(part[None], size, mode="area")[0] for part in (picture, behind))
    least = LEAST_AREA * (short * scale) ** 2
    # A first pass finds the colours; edges between two of them are then not classified as a third.
    colours = {colour for colour, _ in _pieces(_classes(picture, behind, COLOURS), least)}
    pieces = _pieces(_classes(picture, behind, colours), least)
    things = []
    inside = torch.zeros(size, dtype=torch.bool)  # only a smaller object can cover part of another
    for colour, mask in reversed(pieces):
        things.append(_thing(colour, mask, inside, short * scale))
        inside |= mask
    return tuple(reversed(things))


def _classes(picture: Tensor, behind: Tensor, colours: Collection[str]) -> Tensor:
    """Returns each pixel's index in ``COLOURS``; -1 for the background and details.

    Args:
        picture: float [3, height, width].
        behind: what would be there if there were nothing.
        colours: those there may be.
    """
    details = [CREAM] + [DARK] * ("black" not in colours) + [WOOD] * ("brown" not in colours)
    among = [index for index, colour in enumerate(COLOURS) if colour in colours]
    palette = torch.tensor([*(list(COLOURS.values())[index] for index in among), *details]) / 255
    distances = (picture[None] - palette[:, :, None, None]).square().sum(1)
    distances = torch.cat([distances, (picture - behind).square().sum(0)[None]])
    meaning = torch.tensor([*among, *[-1] * (len(details) + 1)])
    return meaning[distances.argmin(0)]


def _pieces(classes: Tensor, least: float) -> list[tuple[str, Tensor]]:
    """Returns the connected pieces of one colour that are not edges, the largest first."""
    found = []
    for index, colour in enumerate(COLOURS):
        mask = classes == index
        if mask.sum() < least:
            continue
        core = _core(mask)
        if core.sum() < least:
            continue
        labels = connected_pieces(core.numpy())
        areas = np.bincount(labels.ravel())[1:]
        for label in np.flatnonzero(areas > least) + 1:
            found.append((colour, _grown(torch.from_numpy(labels == label), THIN) & mask))
    found.sort(key=lambda item: -int(item[1].sum()))
    return [
        piece for index, piece in enumerate(found) if not any(_seen_through(piece, larger) for larger in found[:index])
    ]


def _seen_through(piece: tuple[str, Tensor], larger: tuple[str, Tensor]) -> bool:
    """Whether a piece is part of the larger one, visible through the hole of a third."""
    top, left, bottom, right = _ends(larger[1])
    return piece[0] == larger[0] and bool(piece[1].sum() == piece[1][top:bottom, left:right].sum())


def _core(mask: Tensor) -> Tensor:
    """Returns the mask without thin parts, which are edges between other colours."""
    return _grown(~_grown(~mask, THIN), THIN) & mask


def _grown(mask: Tensor, by: int) -> Tensor:
    return F.max_pool2d(mask[None].float(), 2 * by + 1, 1, by)[0] > 0


def connected_pieces(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns each pixel's component number, from 1, with 8-connectivity; 0 outside ``mask``.

    Each row's runs of pixels are joined with the runs of the row above that they touch.

    Args:
        mask: bool [height, width].
    """
    parents = [0]

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = (edges > 0).nonzero()
    ends = (edges < 0).nonzero()[1]
    numbers = np.zeros(mask.shape, dtype=np.int64)
    runs: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        run = len(parents)
        parents.append(run)
        numbers[row, start:end] = run
        runs[row].append((start, end, run))
        for its_start, its_end, its_run in runs.get(row - 1, ()):
            if its_start <= end and start <= its_end:
                parents[root(its_run)] = root(run)
    return np.array([root(run) for run in range(len(parents))])[numbers]


def _thing(colour: str, mask: Tensor, hiding: Tensor, short: float) -> SeenThing:
    top, left, bottom, right = _ends(mask)
    height, width = mask.shape
    return SeenThing(
        shape=_shape(colour, mask, hiding),
        colour=colour,
        left=left / width,
        top=top / height,
        right=right / width,
        bottom=bottom / height,
        extent=max(bottom - top, right - left) / short,
    )


def _ends(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _stamp(mask: Tensor) -> tuple[Tensor, float]:
    """Returns a mask cropped to its extent at a fixed size, and the log of its aspect ratio."""
    top, left, bottom, right = _ends(mask)
    part = mask[None, None, top:bottom, left:right].float()
    stamp = F.interpolate(part, (TEMPLATE, TEMPLATE), mode="bilinear", align_corners=False, antialias=True)
    return stamp[0, 0], math.log((right - left) / (bottom - top))


def _shape(colour: str, mask: Tensor, hiding: Tensor) -> str:
    stamp, aspect = _stamp(mask)
    top, left, bottom, right = _ends(mask)
    hidden = hiding[None, None, top:bottom, left:right].float()
    counts = 1 - F.interpolate(hidden, (TEMPLATE, TEMPLATE), mode="bilinear", align_corners=False)[0, 0]
    differences = [
        float(((stamp - template).abs() * counts).sum() / counts.sum()) + ASPECT_WEIGHT * abs(aspect - its_aspect)
        for template, its_aspect in _templates(colour)
    ]
    return SHAPES[differences.index(min(differences))]


@lru_cache(maxsize=len(COLOURS))
def _templates(colour: str) -> list[tuple[Tensor, float]]:
    """Returns each shape's mask, without details in other colours."""
    behind = BACKGROUND_COLOURS["white"]
    plain = torch.tensor(behind)[:, None, None].expand(3, WORK_SIDE, WORK_SIDE) / 255
    stamps = []
    for shape in SHAPES:
        picture = _picture_of(Scene((Thing(shape, colour, "large"),)), WORK_SIDE, WORK_SIDE)
        mask = _classes(picture, plain, [colour]) >= 0
        stamps.append(_stamp(_grown(_core(mask), THIN) & mask))
    return stamps

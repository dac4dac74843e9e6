"""Shapes as signed distances, in a frame where a shape's own circle has radius 1 and y grows downwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

Point = tuple[float, float]
Number = float | Tensor
MOST_CORNERS: Final = 10
"""Of a polygon."""


class Layer(NamedTuple):
    """A part of a shape: how far each pixel is from it (negative inside), and its paint; None = the thing's colour."""

    distance: Tensor
    paint: tuple[int, int, int] | None = None


Layers = Callable[[Tensor, Tensor], list[Layer]]

DARK: Final = (40, 30, 30)
CREAM: Final = (250, 235, 215)
WOOD: Final = (105, 62, 28)


def polygon(x: Tensor, y: Tensor, corners: Sequence[Point]) -> Tensor:
    """Returns the signed distance to a polygon, its corners in order, ``MOST_CORNERS`` at most."""
    if not x.is_cuda:
        return to_polygon(x, y, corners)
    # Launched singly, an edge's operations take longer than their work. Compiled once for all sizes and polygons, which
    # flattening and padding make alike.
    return _compiled()(x.flatten(), y.flatten(), _on_device(padded(corners), x.device)).view_as(x)


def padded(corners: Sequence[Point]) -> tuple[Point, ...]:
    """Returns the same polygon by ``MOST_CORNERS`` corners, the last one several times."""
    if len(corners) > MOST_CORNERS:
        raise ValueError(f"a polygon has {len(corners)} corners; allowed: {MOST_CORNERS} at most")
    return (*corners, *[corners[-1]] * (MOST_CORNERS - len(corners)))


def to_polygon(x: Tensor, y: Tensor, corners: Iterable[tuple[Number, Number]]) -> Tensor:
    """Returns what ``polygon`` does; ``corners`` may be a tensor, [corners, 2]."""
    corners = list(corners)
    nearest = torch.full_like(x, math.inf)
    inside = torch.ones_like(x)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        # Of an edge between a corner and itself no part is along it.
        along = ((px * ex + py * ey) / (ex * ex + ey * ey + 1e-30)).clamp(0, 1)
        nearest = torch.minimum(nearest, (px - ex * along).square() + (py - ey * along).square())
        # Each edge that a ray to the right crosses turns outside into inside.
        crosses = ((y >= ay) != (y >= by)) & ((px * ey < py * ex) == (by > ay))
        inside = torch.where(crosses, -inside, inside)
    return nearest.sqrt() * inside


@lru_cache(maxsize=1)
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    made: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(to_polygon, dynamic=True)
    return made


@lru_cache
def _on_device(corners: tuple[Point, ...], device: torch.device) -> Tensor:
    return torch.tensor(corners, device=device)


def disc(x: Tensor, y: Tensor, centre: Point = (0.0, 0.0), radius: float = 1.0) -> Tensor:
    """Returns the signed distance to a disc."""
    return torch.hypot(x - centre[0], y - centre[1]) - radius


def box(x: Tensor, y: Tensor, left: float, top: float, right: float, bottom: float) -> Tensor:
    """Returns the signed distance to a rectangle."""
    across = (x - (left + right) / 2).abs() - (right - left) / 2
    down = (y - (top + bottom) / 2).abs() - (bottom - top) / 2
    return torch.hypot(across.clamp(min=0), down.clamp(min=0)) + torch.maximum(across, down).clamp(max=0)


def _mirrored(corners: Sequence[Point]) -> list[Point]:
    return [*corners, *((-x, y) for x, y in reversed(corners) if x)]


STAR: Final = [
    (radius * math.sin(turn * math.pi / 5), -radius * math.cos(turn * math.pi / 5))
    for turn, radius in enumerate((1.0, 0.43) * 5)
]


def _heart(x: Tensor, y: Tensor) -> list[Layer]:
    lobes = disc(x.abs(), y, (0.46, -0.36), 0.5)
    tip = polygon(x, y, [(0, -0.56), (0.82, -0.01), (0, 0.95), (-0.82, -0.01)])
    return [Layer(torch.minimum(lobes, tip))]


def _tree(x: Tensor, y: Tensor) -> list[Layer]:
    crown = _mirrored([(0, -1), (0.5, -0.3), (0.3, -0.3), (0.72, 0.5)])
    return [Layer(box(x, y, -0.15, 0.45, 0.15, 0.98), WOOD), Layer(polygon(x, y, crown))]


def _house(x: Tensor, y: Tensor) -> list[Layer]:
    walls = torch.minimum(box(x, y, -0.68, -0.15, 0.68, 0.9), box(x, y, 0.38, -0.85, 0.6, 0.0))
    roof = polygon(x, y, [(0, -0.95), (0.95, -0.1), (-0.95, -0.1)])
    return [
        Layer(torch.minimum(walls, roof)),
        Layer(box(x, y, -0.42, 0.3, -0.08, 0.9), DARK),
        Layer(box(x, y, 0.14, 0.25, 0.48, 0.58), CREAM),
    ]


def _fox(x: Tensor, y: Tensor) -> list[Layer]:
    # An ear, a cheek, the chin.
    face = [(0, -0.42), (0.3, -0.48), (0.78, -0.98), (0.92, 0.1), (0.14, 0.95), (0, 0.98)]
    return [
        Layer(polygon(x, y, _mirrored(face))),
        Layer(polygon(x.abs(), y, [(0.18, 0.12), (0.74, 0.16), (0.2, 0.7)]), CREAM),
        Layer(disc(x.abs(), y, (0.36, -0.1), 0.11), DARK),
        Layer(disc(x, y, (0, 0.82), 0.14), DARK),
    ]


SHAPE_LAYERS: Final[dict[str, Layers]] = {
    "circle": lambda x, y: [Layer(disc(x, y, radius=0.97))],
    "square": lambda x, y: [Layer(box(x, y, -0.86, -0.86, 0.86, 0.86))],
    "triangle": lambda x, y: [Layer(polygon(x, y, [(0, -0.95), (0.98, 0.82), (-0.98, 0.82)]))],
    "star": lambda x, y: [Layer(polygon(x, y, STAR))],
    "ring": lambda x, y: [Layer((torch.hypot(x, y) - 0.8).abs() - 0.19)],
    "heart": _heart,
    "tree": _tree,
    "house": _house,
    "fox": _fox,
    "diamond": lambda x, y: [Layer(polygon(x, y, [(0, -1), (0.86, 0), (0, 1), (-0.86, 0)]))],
    "cross": lambda x, y: [Layer(torch.minimum(box(x, y, -0.9, -0.3, 0.9, 0.3), box(x, y, -0.3, -0.9, 0.3, 0.9)))],
    "moon": lambda x, y: [Layer(torch.maximum(disc(x, y, radius=0.97), -disc(x, y, (0.5, -0.18), 0.75)))],
}
"""The layers of each shape, the lowest first, from the pixels' x and y in its frame."""

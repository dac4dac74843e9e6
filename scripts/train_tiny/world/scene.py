"""What a scene is, and scenes drawn by lot."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from .vocabulary import (
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    COLOURS,
    CONTAINERS,
    LETTERS,
    MAX_LETTERS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIGN_PLACES,
    SIZES,
    WORDS,
)

DIAMETERS: Final = {"small": 0.22, "large": 0.38}
"""Of a thing, in short sides of the picture."""
CONTAINER_DIAMETER: Final = 0.57
"""Of a large thing that holds another."""
MOST_THINGS: Final = 3
SIGN_BAND: Final = 0.24
"""What a sign keeps things out of, of the picture's height, in short sides."""
HELD_OUT_EVERY: Final = 10


@dataclass(frozen=True)
class Thing:
    """One thing.

    Attributes:
        shape: one of ``SHAPES``.
        colour: one of ``COLOURS``.
        size: one of ``SIZES``.
        x: its centre, as a share of the picture's width.
        y: its centre, as a share of the height that a sign leaves free.
    """

    shape: str
    colour: str
    size: str
    x: float = 0.5
    y: float = 0.5


@dataclass(frozen=True)
class Sign:
    """A white board with a word of 1 to ``MAX_LETTERS`` capital letters, at one of ``SIGN_PLACES``."""

    word: str
    place: str = "bottom"


@dataclass(frozen=True)
class Background:
    """What is behind: one colour when plain; else two: first above second, or taking turns from the top left."""

    kind: str = "plain"
    colours: tuple[str, ...] = ("white",)


@dataclass(frozen=True)
class Scene:
    """A picture's content.

    Attributes:
        things: ``MOST_THINGS`` at most, of different colours.
        relation: one of ``PLACES`` for one thing; else one of ``RELATIONS``, which the first thing is to the second,
            and the second to the third.
        background: behind them.
        sign: None = none.
    """

    things: tuple[Thing, ...]
    relation: str = "middle"
    background: Background = Background()
    sign: Sign | None = None

    @property
    def held_out(self) -> bool:
        """Whether these shapes and colours in this relation, or this word, are kept from training."""
        return combination_held_out(self) or (self.sign is not None and word_held_out(self.sign.word))

    def diameter(self, index: int) -> float:
        """Returns the diameter of a thing in short sides of the picture."""
        if self.relation == "inside" and index == 1:
            return CONTAINER_DIAMETER
        return DIAMETERS[self.things[index].size]


def combination_held_out(scene: Scene) -> bool:
    """Whether these shapes and colours, in this relation when there are several, are kept from training."""
    things = " ".join(f"{thing.colour} {thing.shape}" for thing in scene.things)
    return _set_aside(things if len(scene.things) == 1 else f"{scene.relation}: {things}")


def word_held_out(word: str) -> bool:
    """Whether a sign's word is kept from training."""
    return _set_aside(f"word {word}")


def _set_aside(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT_EVERY == 0


def sample_scene(rng: Random, held_out: bool = False, things: int | None = None, sign: bool | None = None) -> Scene:
    """Draws a scene.

    Args:
        rng: decides everything.
        held_out: whether its combination and its word are ones kept from training; else neither is.
        things: how many; None = one to three.
        sign: whether there is one; None = sometimes.
    """
    requested = things
    while True:
        things = requested or rng.choices((1, 2, 3), (0.35, 0.45, 0.2))[0]
        board = sample_sign(rng, held_out) if (rng.random() < 0.4 if sign is None else sign) else None
        relation = _sample_relation(rng, things, board)
        kinds = _sample_things(rng, things, relation, board)
        scene = Scene(kinds, relation, sample_background(rng), board)
        if combination_held_out(scene) == held_out:
            return placed(rng, scene)


def sample_sign(rng: Random, held_out: bool = False) -> Sign:
    """Draws a sign whose word is one kept from training, or not."""
    while True:
        if rng.random() < 0.5:
            word = rng.choice(WORDS)
        else:
            word = "".join(rng.choices(LETTERS, k=rng.choices(range(1, MAX_LETTERS + 1), (2, 3, 4, 4, 3, 2))[0]))
        if word_held_out(word) == held_out:
            return Sign(word, rng.choices(SIGN_PLACES, (0.75, 0.25))[0])


def sample_background(rng: Random) -> Background:
    """Draws a background."""
    kind = rng.choices(BACKGROUNDS, (0.4, 0.2, 0.2, 0.2))[0]
    if kind == "plain" and rng.random() < 0.3:
        return Background()
    return Background(kind, tuple(rng.sample(list(BACKGROUND_COLOURS), 1 if kind == "plain" else 2)))


def _sample_relation(rng: Random, things: int, sign: Sign | None) -> str:
    if things == 1:
        return rng.choices(PLACES, (4, 1, 1, 1, 1))[0]
    if things == 2:
        return rng.choice(RELATIONS)
    return "left of" if sign else rng.choice(("left of", "above"))


def _sample_things(rng: Random, things: int, relation: str, sign: Sign | None) -> tuple[Thing, ...]:
    colours = rng.sample(list(COLOURS), things)
    shapes = [rng.choice(SHAPES) for _ in range(things)]
    sizes = [rng.choices(SIZES, (0.35, 0.65))[0] for _ in range(things)]
    if relation == "inside":
        shapes[1] = rng.choice(CONTAINERS)
        sizes = ["small", "large"]
    elif things == 3 or (relation == "above" and sign):  # two large ones don't fit
        sizes = ["small"] * things
        sizes[rng.randrange(things)] = rng.choice(SIZES)
    return tuple(Thing(*kind) for kind in zip(shapes, colours, sizes, strict=True))


def placed(rng: Random, scene: Scene) -> Scene:
    """Returns the scene with its things where its relation wants them, give or take a little.

    They don't overlap in any picture, wide or tall, unless one is inside the other.
    """
    height = 1 - SIGN_BAND if scene.sign else 1.0
    diameters = [scene.diameter(index) for index in range(len(scene.things))]
    if scene.relation in ("left of", "left", "right"):
        x, y = _along(rng, diameters, 1.0, scene.relation), _across(rng, diameters, height)
    elif scene.relation in ("above", "top", "bottom"):
        x, y = _across(rng, diameters, 1.0), _along(rng, diameters, height, scene.relation)
    else:  # in the middle, or one inside the other
        x, y = [0.5 + rng.uniform(-0.04, 0.04)] * 2, [0.5 + rng.uniform(-0.04, 0.04)] * 2
    where = zip(scene.things, x, y, strict=False)
    return replace(scene, things=tuple(replace(thing, x=left, y=top) for thing, left, top in where))


def _along(rng: Random, diameters: Sequence[float], length: float, relation: str) -> list[float]:
    alone = len(diameters) == 1
    if alone:  # as if another of any size were on the other side
        diameters = [*diameters, DIAMETERS["small" if length < 1 else rng.choice(SIZES)]]
        if relation in ("right", "bottom"):
            diameters = diameters[::-1]
    gaps = [rng.uniform(0.8, 1.2) for _ in range(len(diameters) + 1)]
    scale = (length - sum(diameters)) / sum(gaps)
    centres, edge = [], 0.0
    for gap, diameter in zip(gaps, diameters, strict=False):
        centres.append((edge + gap * scale + diameter / 2) / length)
        edge += gap * scale + diameter
    if alone:
        return centres[-1:] if relation in ("right", "bottom") else centres[:1]
    return centres


def _across(rng: Random, diameters: Sequence[float], length: float) -> list[float]:
    room = [min(0.08, (length - diameter) / 2 - 0.02) / length for diameter in diameters]
    return [0.5 + rng.uniform(-most, most) for most in room]

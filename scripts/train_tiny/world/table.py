"""Scenes as arrays, so that many are drawn and labelled at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layout import Frame
from .scene import MOST_THINGS, Scene
from .vocabulary import BACKGROUND_COLOURS, BACKGROUNDS, COLOURS, LETTERS, SHAPES, SIGN_PLACES

NO_THING: Final = -1
PLACES_OF_SIGNS: Final = (None, *SIGN_PLACES)
"""Of a sign; None = there is none."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class Circles(NamedTuple):
    """Where the pictures' things of one number are, in pixels."""

    x: Floats
    y: Floats
    radius: Floats


class Signs(NamedTuple):
    """Signs at one place, with words of one length.

    Attributes:
        rows: the pictures that have one, [n].
        place: ``top`` or ``bottom``.
        letters: indices into ``LETTERS``, [n, length].
    """

    rows: Integers
    place: str
    letters: Integers


class Table(NamedTuple):
    """A row for each scene, a column for each thing.

    Attributes:
        shapes: indices into ``SHAPES``, [n, 3]; ``NO_THING`` where there is none.
        colours: into ``COLOURS``, [n, 3].
        x: of the things' centres, in widths of the frame, [n, 3].
        y: likewise, in its heights.
        diameters: in short sides, [n, 3]; 1 where there is no thing.
        inside: whether the first thing is inside the second, bool [n].
        backgrounds: indices into ``BACKGROUNDS``, [n].
        ends: RGB of the background's first and last colour, [n, 2, 3].
        places: of the signs, indices into ``PLACES_OF_SIGNS``, [n].
        words: on the signs; empty where there is none.
    """

    shapes: Integers
    colours: Integers
    x: Floats
    y: Floats
    diameters: Floats
    inside: NDArray[np.bool_]
    backgrounds: Integers
    ends: Integers
    places: Integers
    words: Sequence[str]

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Table:
        """Reads scenes."""
        things = np.asarray([_things(scene) for scene in scenes]).reshape(len(scenes), MOST_THINGS, 5)
        kinds = [scene.background for scene in scenes]
        ends = [[BACKGROUND_COLOURS[kind.colours[end]] for end in (0, -1)] for kind in kinds]
        return cls(
            things[..., 0].astype(np.int64),
            things[..., 1].astype(np.int64),
            *(things[..., column] for column in (2, 3, 4)),
            np.asarray([scene.relation == "inside" for scene in scenes], dtype=bool),
            np.asarray([BACKGROUNDS.index(kind.kind) for kind in kinds], dtype=np.int64),
            np.asarray(ends, dtype=np.int64).reshape(-1, 2, 3),
            np.asarray([PLACES_OF_SIGNS.index(scene.sign and scene.sign.place) for scene in scenes], dtype=np.int64),
            [scene.sign.word if scene.sign else "" for scene in scenes],
        )

    def circles(self, thing: int, height: int, width: int) -> Circles:
        """Returns where each scene's thing of a number is, on pictures of a size: [n] each."""
        frames = [Frame.of(place, height, width) for place in PLACES_OF_SIGNS]
        top, tall = np.asarray([(frame.top, frame.height) for frame in frames])[self.places].T
        radius = self.diameters[:, thing] * min(height, width) / 2
        return Circles(self.x[:, thing] * width, top + self.y[:, thing] * tall, radius)

    def signs(self) -> Iterator[Signs]:
        """Deals the signs out to places and lengths of words."""
        lengths = np.asarray([len(word) for word in self.words], dtype=np.int64)
        for place, length in np.unique(np.stack([self.places, lengths], axis=1)[lengths > 0], axis=0):
            rows = np.flatnonzero((self.places == place) & (lengths == length))
            letters = [[LETTERS.index(letter) for letter in self.words[row]] for row in rows]
            yield Signs(rows, str(PLACES_OF_SIGNS[place]), np.asarray(letters, dtype=np.int64))


SHAPE_INDEX: Final = {name: index for index, name in enumerate(SHAPES)}
COLOUR_INDEX: Final = {name: index for index, name in enumerate(COLOURS)}
NOTHING: Final = (float(NO_THING), 0.0, 0.0, 0.0, 1.0)


def _things(scene: Scene) -> list[tuple[float, ...]]:
    found = [
        (SHAPE_INDEX[thing.shape], COLOUR_INDEX[thing.colour], thing.x, thing.y, scene.diameter(index))
        for index, thing in enumerate(scene.things)
    ]
    return [*found, *[NOTHING] * (MOST_THINGS - len(found))]

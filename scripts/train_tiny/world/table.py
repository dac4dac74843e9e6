"""Scenes as arrays, so that many are drawn and labelled at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layout import Frame
from .scene import MOST_THINGS, Scene
from .vocabulary import BACKGROUND_COLOURS, BACKGROUNDS, COLOURS, LETTERS, MAX_LETTERS, SHAPES, SIGN_PLACES

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
        words: on the signs, str [n]; empty where there is none.
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
    words: NDArray[np.str_]

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
            np.asarray([scene.sign.word if scene.sign else "" for scene in scenes], dtype=f"U{MAX_LETTERS}"),
        )

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        """Puts tables one under the other."""
        return cls(*map(np.concatenate, zip(*tables, strict=True)))

    @property
    def length(self) -> int:
        """How many scenes there are."""
        return len(self.words)

    def rows(self, chosen: slice | Integers) -> Table:
        """Returns the table of some of the scenes."""
        return Table(*(column[chosen] for column in self))

    def changes(self) -> NDArray[np.bool_]:
        """Returns whether each scene but the first is another than the one before: [n - 1]."""
        columns = (column.reshape(self.length, -1) for column in self)
        return np.any([(column[1:] != column[:-1]).any(axis=1) for column in columns], axis=0)

    def circles(self, thing: int, height: int, width: int) -> Circles:
        """Returns where each scene's thing of a number is, on pictures of a size: [n] each."""
        frames = [Frame.of(place, height, width) for place in PLACES_OF_SIGNS]
        top, tall = np.asarray([(frame.top, frame.height) for frame in frames])[self.places].T
        radius = self.diameters[:, thing] * min(height, width) / 2
        return Circles(self.x[:, thing] * width, top + self.y[:, thing] * tall, radius)

    def signs(self) -> Iterator[Signs]:
        """Deals the signs out to places and lengths of words."""
        lengths = np.char.str_len(self.words)
        for place, length in np.unique(np.stack([self.places, lengths], axis=1)[lengths > 0], axis=0):
            rows = np.flatnonzero((self.places == place) & (lengths == length))
            # The letters follow one another in Unicode.
            letters = self.words[rows].astype(f"U{length}").view(np.uint32).reshape(-1, length)
            yield Signs(rows, str(PLACES_OF_SIGNS[place]), letters.astype(np.int64) - ord(LETTERS[0]))


SHAPE_INDEX: Final = {name: index for index, name in enumerate(SHAPES)}
COLOUR_INDEX: Final = {name: index for index, name in enumerate(COLOURS)}
NOTHING: Final = (float(NO_THING), 0.0, 0.0, 0.0, 1.0)


def _things(scene: Scene) -> list[tuple[float, ...]]:
    found = [
        (SHAPE_INDEX[thing.shape], COLOUR_INDEX[thing.colour], thing.x, thing.y, scene.diameter(index))
        for index, thing in enumerate(scene.things)
    ]
    return [*found, *[NOTHING] * (MOST_THINGS - len(found))]

"""Compares an image's contents with the requested scene."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Final

from eval.seeing import Seen, SeenThing
from train_tiny.world.edits import Edit
from train_tiny.world.scene import Background, Scene, Thing

Verdict = dict[str, bool]
"""Whether each requested property is correct."""

PROPERTIES: Final = ("count", "colour", "shape", "size", "position", "background", "word", "short_word", "all")
SHORT_WORD: Final = 4
APART: Final = 0.06
"""Minimum offset, as a share of the image, of an object left of or above another."""
SAME_PLACE: Final = 0.09
"""Maximum movement, as a share of the image, of an object that must stay."""
OFF_MIDDLE: Final = 0.08


def judge(seen: Seen, requested: Scene) -> Verdict:
    """Judges each property of a scene.

    ``count``: as many things, and a sign where there is to be one. ``colour``: these colours and no others. ``shape``,
    ``size``: those of every thing, found by its colour where that is right. ``position``: the relation; for a thing
    alone its side, unless it is to be in the middle, where things are by default. ``word``: every letter;
    ``short_word`` likewise, for at most ``SHORT_WORD``. ``all``: all of these.
    """
    pairs = match(requested.things, seen.things)
    verdict = {
        "count": len(seen.things) == len(requested.things) and (seen.sign is None) == (requested.sign is None),
        "colour": sorted(thing.colour for thing in seen.things) == sorted(thing.colour for thing in requested.things),
        "shape": all(found is not None and found.shape == thing.shape for thing, found in pairs),
        "size": all(found is not None and found.size == thing.size for thing, found in pairs),
        "background": same_background(seen.background, requested.background),
    }
    if requested.relation != "middle":
        verdict["position"] = related(requested.relation, [found for _, found in pairs])
    if requested.sign:
        verdict["word"] = word_right(seen, requested)
        if len(requested.sign.word) <= SHORT_WORD:
            verdict["short_word"] = verdict["word"]
    verdict["all"] = all(verdict.values())
    return verdict


def judge_edit(seen: Seen, edit: Edit) -> Verdict:
    """Judges whether an edit's change is present (``changed``) and the rest unchanged (``kept``)."""
    before, after = edit.before, edit.after
    pairs = match(after.things, seen.things)
    found = [seen_thing for _, seen_thing in pairs]
    stayed = [thing for thing in after.things if thing in before.things]
    still_there = all(thing_kept(thing, there) for thing, there in pairs if thing in stayed)
    new = [(thing, there) for thing, there in pairs if thing not in stayed]
    background = same_background(seen.background, after.background)
    word = word_right(seen, after)
    counted = len(seen.things) == len(after.things)
    if edit.kind == "background":
        return {"changed": background, "kept": counted and still_there and word}
    if edit.kind == "word":
        return {"changed": word, "kept": counted and still_there and background}
    if edit.kind == "recolour":
        changed = all(there is not None and there.colour == thing.colour for thing, there in new)
        kept = all(thing_kept(thing, there, colour=False) for thing, there in new)
        return {"changed": changed, "kept": counted and kept and still_there and background and word}
    if edit.kind == "move":
        kept = all(there is not None and alike(thing, there) for thing, there in pairs)
        moved = in_the_middle(found) if after.relation == "middle" else related(after.relation, found)
        return {"changed": moved, "kept": counted and kept and background and word}
    if edit.kind == "add":
        there_now = all(there is not None and alike(thing, there) for thing, there in new)
        return {"changed": there_now and related(after.relation, found), "kept": still_there and background and word}
    gone = {thing.colour for thing in before.things} - {thing.colour for thing in after.things}
    changed = not any(thing.colour in gone for thing in seen.things)
    return {"changed": changed, "kept": still_there and background and word}


def match(things: Sequence[Thing], seen: Sequence[SeenThing]) -> list[tuple[Thing, SeenThing | None]]:
    """Matches each object with a seen one: by colour, else by shape and distance."""

    def difference(thing: Thing, there: SeenThing | None) -> float:
        if there is None:
            return 100.0
        far = abs(thing.x - there.x) + abs(thing.y - there.y)
        return 10 * (thing.colour != there.colour) + 2 * (thing.shape != there.shape) + far

    choices: Iterable[tuple[SeenThing | None, ...]] = itertools.permutations(
        [*seen[:5], *[None] * len(things)], len(things)
    )
    best = min(choices, key=lambda chosen: sum(map(difference, things, chosen)))
    return list(zip(things, best, strict=True))


def same_background(seen: Background, requested: Background) -> bool:
    """Whether kind and colours are the same; their order matters in a gradient only."""
    if seen.kind != requested.kind:
        return False
    return seen.colours == requested.colours or (
        seen.kind != "gradient" and set(seen.colours) == set(requested.colours)
    )


def word_right(seen: Seen, requested: Scene) -> bool:
    """Whether the sign's word is there; without a sign, whether there is none."""
    return (seen.sign and seen.sign.word) == (requested.sign and requested.sign.word)


def related(relation: str, found: Sequence[SeenThing | None]) -> bool:
    """Whether each thing has the relation to the next; whether one alone is on its side."""
    things = [thing for thing in found if thing is not None]
    if len(things) < len(found):
        return False
    if len(things) == 1:
        return _on_side(relation, things[0])
    return all(_pair_related(relation, *pair) for pair in itertools.pairwise(things))


def _pair_related(relation: str, first: SeenThing, second: SeenThing) -> bool:
    if relation == "inside":
        return second.holds(first)
    across, down = second.x - first.x, second.y - first.y
    return across > max(APART, abs(down)) if relation == "left of" else down > max(APART, abs(across))


def _on_side(place: str, thing: SeenThing) -> bool:
    return {
        "left": thing.x < 0.5 - OFF_MIDDLE,
        "right": thing.x > 0.5 + OFF_MIDDLE,
        "top": thing.y < 0.5 - OFF_MIDDLE,
        "bottom": thing.y > 0.5 + OFF_MIDDLE,
        "middle": in_the_middle([thing]),
    }[place]


def in_the_middle(found: Sequence[SeenThing | None]) -> bool:
    """Whether the only thing is in the middle."""
    return all(thing is not None and max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 2 * OFF_MIDDLE for thing in found)


def alike(thing: Thing, there: SeenThing, colour: bool = True) -> bool:
    """Whether shape and size, and colour if it matters, are the same."""
    return thing.shape == there.shape and thing.size == there.size and (thing.colour == there.colour or not colour)


def thing_kept(thing: Thing, there: SeenThing | None, colour: bool = True) -> bool:
    """Whether a thing is still what it was, where it was."""
    if there is None or not alike(thing, there, colour):
        return False
    return abs(thing.x - there.x) < SAME_PLACE and abs(thing.y - there.y) < SAME_PLACE

"""Changes of a scene and the words that ask for them, for image-to-image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from .caption import COLOURS_ZH, LANGUAGES, background_words, name, quoted
from .scene import Scene, placed, sample_background, sample_scene, sample_sign
from .vocabulary import COLOURS, PLACES

SIDES: Final = {"left of": ("left", "right"), "above": ("top", "bottom")}
"""Where the first and the second of two things are when the other one goes."""


@dataclass(frozen=True)
class Edit:
    """A change.

    Attributes:
        before: what the source shows.
        instruction: what is asked for.
        after: what the answer is to show; what was not asked for stays where it was.
        kind: one of ``KINDS``.
    """

    before: Scene
    instruction: str
    after: Scene
    kind: str


Change = tuple[Scene, str, Scene]


def sample_edit(rng: Random, held_out: bool = False, kind: str | None = None, language: str | None = None) -> Edit:
    """Draws a change.

    Args:
        rng: decides everything.
        held_out: whether what comes out, and a new word, is kept from training; else neither scene is.
        kind: one of ``KINDS``; None = any.
        language: one of ``LANGUAGES``; None = English more often than Chinese.
    """
    kind = kind or rng.choice(KINDS)
    language = language or _language(rng)
    while True:
        # Any scene may be before a held-out one, so that every kind of change can lead there.
        before = sample_scene(rng, held_out and rng.random() < 0.5, sign=True if kind == "word" else None)
        change = CHANGES[kind](rng, before, language)
        if change is None:
            continue
        before, instruction, after = change
        if after.held_out if held_out else not (before.held_out or after.held_out):
            return Edit(before, instruction, after, kind)


def sample_removals(rng: Random) -> list[Edit]:
    """Draws a scene and each of the things that could go from it: only the words tell these changes from each other."""
    while True:
        scene, language = sample_scene(rng), _language(rng)
        if not _parts(scene) or scene.held_out:
            continue
        changes = [_removal(rng, scene, language, index) for index in range(len(scene.things))]
        if not any(after.held_out for _, _, after in changes):
            return [Edit(*change, "remove") for change in changes]


def _language(rng: Random) -> str:
    return rng.choices(LANGUAGES, (0.65, 0.35))[0]


def _recolour(rng: Random, scene: Scene, language: str) -> Change:
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    colour = rng.choice([colour for colour in COLOURS if all(colour != other.colour for other in scene.things)])
    things = (*scene.things[:index], replace(thing, colour=colour), *scene.things[index + 1 :])
    known = name(thing, rng, language, "never", "the")
    if language == "zh":
        instruction = rng.choice(("把{0}变成{1}", "把{0}改成{1}", "将{0}的颜色换成{1}")).format(
            known, COLOURS_ZH[colour]
        )
    else:
        instruction = rng.choice(("Make {0} {1}", "Turn {0} {1}", "Paint {0} {1}", "Change {0} to {1}")).format(
            known, colour
        )
    return scene, instruction, replace(scene, things=things)


def _move(rng: Random, scene: Scene, language: str) -> Change | None:
    if len(scene.things) == 1:
        return _move_alone(rng, scene, language)
    if len(scene.things) == 3 or scene.relation == "inside":
        return None
    things, relation = scene.things, rng.choice(list(SIDES))
    if relation == scene.relation or rng.random() < 0.5:
        things = things[::-1]
    if relation == "above" and scene.sign and all(thing.size == "large" for thing in things):
        return None
    after = placed(rng, replace(scene, things=things, relation=relation))
    names = [name(thing, rng, language, "never", "the") for thing in things]
    if relation == scene.relation and rng.random() < 0.4:
        rng.shuffle(names)
        instruction = ("把{0}和{1}的位置互换" if language == "zh" else "Swap {0} and {1}").format(*names)
    elif language == "zh":
        instruction = {"left of": "把{0}移到{1}的左边", "above": "把{0}移到{1}的上方"}[relation].format(*names)
    else:
        instruction = {"left of": "Move {0} to the left of {1}", "above": "Move {0} above {1}"}[relation].format(*names)
    return scene, instruction, after


def _move_alone(rng: Random, scene: Scene, language: str) -> Change:
    place = rng.choice([place for place in PLACES if place != scene.relation])
    known = name(scene.things[0], rng, language, "never", "the")
    if language == "zh":
        where = {"middle": "中间", "left": "左边", "right": "右边", "top": "上方", "bottom": "下方"}[place]
        instruction = f"把{known}移到{where}"
    else:
        where = {
            "middle": "to the middle", "left": "to the left", "right": "to the right",
            "top": "to the top", "bottom": "to the bottom",
        }[place]  # fmt: skip
        instruction = f"{rng.choice(('Move', 'Put'))} {known} {where}"
    return scene, instruction, placed(rng, replace(scene, relation=place))


def _remove(rng: Random, scene: Scene, language: str) -> Change | None:
    return _removal(rng, scene, language, rng.randrange(len(scene.things))) if _parts(scene) else None


def _removal(rng: Random, scene: Scene, language: str, index: int) -> Change:
    known = name(scene.things[index], rng, language, "never", "the")
    ways = ("去掉{}", "删除{}", "把{}移除") if language == "zh" else ("Remove {}", "Take away {}", "Delete {}")
    return scene, rng.choice(ways).format(known), _without(scene, index)


def _add(rng: Random, scene: Scene, language: str) -> Change | None:
    if not _parts(scene):
        return None
    index = rng.randrange(len(scene.things))
    before = _without(scene, index)
    near = index + 1 if index + 1 < len(scene.things) else index - 1
    first = index < near
    new = name(scene.things[index], rng, language)
    known = name(scene.things[near], rng, language, "never", "the")
    sides = {"left of": ("to the left of", "to the right of"), "above": ("above", "below")}[scene.relation]
    if language == "zh":
        where = {"left of": ("左边", "右边"), "above": ("上方", "下方")}[scene.relation][0 if first else 1]
        return before, f"在{known}的{where}{rng.choice(('加上', '添加'))}{new}", scene
    return before, f"{rng.choice(('Add', 'Put'))} {new} {sides[0 if first else 1]} {known}", scene


def _parts(scene: Scene) -> bool:
    """Tells whether a thing can go, and the others stay as they are."""
    return len(scene.things) > 1 and scene.relation != "inside"


def _without(scene: Scene, index: int) -> Scene:
    left = (*scene.things[:index], *scene.things[index + 1 :])
    relation = scene.relation if len(left) == 2 else SIDES[scene.relation][1 - index]
    return replace(scene, things=left, relation=relation)


def _background(rng: Random, scene: Scene, language: str) -> Change | None:
    background = sample_background(rng)
    if background == scene.background:
        return None
    words = background_words(background, rng, language)
    if language == "zh":
        return scene, rng.choice(("换成{}", "改为{}")).format(words), replace(scene, background=background)
    instruction = rng.choice(("Put everything {}", "Change the background: {}", "Show it {}")).format(words)
    return scene, instruction, replace(scene, background=background)


def _word(rng: Random, scene: Scene, language: str) -> Change | None:
    if scene.sign is None:
        return None
    # Half of the new words are held-out ones; the caller throws away what it must not have.
    word = sample_sign(rng, rng.random() < 0.5).word
    if word == scene.sign.word:
        return None
    ways = ("把牌子上的字改成{}", "让牌子写着{}") if language == "zh" else (
        "Change the word to {}", "Make the sign say {}", "Replace the word on the sign with {}"
    )  # fmt: skip
    instruction = rng.choice(ways).format(quoted(word, rng, language))
    return scene, instruction, replace(scene, sign=replace(scene.sign, word=word))


CHANGES: Final[dict[str, Callable[[Random, Scene, str], Change | None]]] = {
    "recolour": _recolour,
    "move": _move,
    "add": _add,
    "remove": _remove,
    "background": _background,
    "word": _word,
}
KINDS: Final = tuple(CHANGES)

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import product
from random import Random

import pytest
import torch

from glm_image.request.geometry import PIXELS_PER_TOKEN, Size
from glm_image.request.prompts import quoted_strings
from train_tiny.data import MAIN_SIZE
from train_tiny.world import shapes
from train_tiny.world.caption import COLOURS_ZH, LANGUAGES, SHAPES_ZH, caption
from train_tiny.world.draw import draw
from train_tiny.world.edits import KINDS, sample_edit, sample_removals
from train_tiny.world.layout import CODE_SIDE, LETTERED_SIDE, Board, Frame
from train_tiny.world.paraphrase import RULES, in_other_words, paraphrased
from train_tiny.world.scene import Background, Scene, Sign, Thing, combination_held_out, sample_scene, word_held_out
from train_tiny.world.shapes import SHAPE_LAYERS, padded, to_polygon
from train_tiny.world.vocabulary import (
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    COLOURS,
    MAX_LETTERS,
    RELATIONS,
    SHAPES,
    SIGN_PLACES,
)


def test_scenes_are_a_function_of_the_seed() -> None:
    assert sample_scene(Random(7)) == sample_scene(Random(7))
    assert sample_scene(Random(7)) != sample_scene(Random(8))


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_scenes_stay_apart(held_out: bool) -> None:
    rng = Random(1)
    for scene in (sample_scene(rng, held_out) for _ in range(300)):
        assert combination_held_out(scene) == held_out
        assert scene.sign is None or word_held_out(scene.sign.word) == held_out


def test_no_scene_of_a_training_edit_is_held_out() -> None:
    rng = Random(2)
    for edit in (sample_edit(rng) for _ in range(300)):
        assert not edit.before.held_out
        assert not edit.after.held_out


def test_removals_of_a_scene_remove_each_object_and_differ_only_in_the_instruction() -> None:
    rng = Random(4)
    for removals in (sample_removals(rng) for _ in range(100)):
        before = removals[0].before
        assert all(edit.before == before and not edit.after.held_out for edit in removals)
        gone = [next(iter(set(before.things) - set(edit.after.things))) for edit in removals]
        assert gone == list(before.things)
        assert len({edit.instruction for edit in removals}) == len(removals)


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_out_edit_leads_to_a_held_out_scene(kind: str) -> None:
    rng = Random(3)
    for edit in (sample_edit(rng, True, kind) for _ in range(20)):
        assert edit.after.held_out
        assert edit.before != edit.after


def test_a_share_of_scenes_is_held_out_and_everything_is_seen() -> None:
    rng = Random(4)
    scenes = [sample_scene(rng) for _ in range(1500)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {scene.background.kind for scene in scenes} == set(BACKGROUNDS)
    assert {colour for scene in scenes for colour in scene.background.colours} == set(BACKGROUND_COLOURS)
    combinations = [
        Scene((Thing(a, b, "large"), Thing(c, d, "large")), relation)
        for a in SHAPES for b in COLOURS for c in SHAPES for d in COLOURS for relation in RELATIONS
    ]  # fmt: skip
    share = sum(map(combination_held_out, combinations)) / len(combinations)
    assert 0.09 < share < 0.11


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_only_quoted_text_of_a_caption_is_the_word(language: str) -> None:
    rng = Random(5)
    for scene in (sample_scene(rng) for _ in range(300)):
        assert quoted_strings(caption(scene, rng, language)) == ([scene.sign.word] if scene.sign else [])


@lru_cache
def texts(count: int) -> list[str]:
    rng = Random(7)
    captions = [caption(sample_scene(rng), rng, rng.choice(LANGUAGES)) for _ in range(count)]
    return captions + [sample_edit(rng).instruction for _ in range(count)]


SYNONYMS = {
    "grey": "gray", "purple": "violet", "cyan": "turquoise", "light": "pale", "small": "little|tiny",
    "large": "big|huge", "circle": "round disc|disc|dot", "star": "five-pointed star",
    "tree": "fir tree|Christmas tree|pine", "house": "home|cottage", "heart": "love heart|heart shape", "cross": "plus",
    "diamond": "rhombus", "ring": "hoop", "fox": "fox face|fox head|(face|head) of (a )?fox", "moon": "crescent moon",
    "正方形": "方块|方形", "星星": "五角星", "爱心": "心形|(?<!爱)心(?!形)", "十字": "加号",
    "房子": "屋子", "月亮": "月牙",
}  # fmt: skip
"""Of what a picture shows, each as a regular expression."""


def word_counts(text: str) -> Counter[str]:
    """How often a text says each shape, colour and size, whatever the synonyms."""
    text = re.sub("(?<=['\"“「])[A-Za-z]+(?=['\"”」])", "", text)  # the word on a sign
    for word, others in SYNONYMS.items():
        text = re.sub(f"({others})(?![a-z])", word, text)
    colours = [part for colour in (*COLOURS, *BACKGROUND_COLOURS) for part in colour.split()]
    english = {*SHAPES, *colours, "small", "large"}
    chinese = [*SHAPES_ZH.values(), *(colour[:-1] for colour in COLOURS_ZH.values()), "大", "小"]
    words = re.findall("|".join(sorted(chinese, key=len, reverse=True)), text)
    return Counter([*words, *(word for word in re.findall("[a-z]+", text) if word in english)])


def test_paraphrases_keep_objects_and_letters() -> None:
    rng = Random(8)
    others = {text: in_other_words(text, rng) for text in texts(3000)}
    assert sum(text != other for text, other in others.items()) > 0.8 * len(others)
    for text, other in others.items():
        assert [word.upper() for word in quoted_strings(other)] == quoted_strings(text)
        assert word_counts(other) == word_counts(text), (text, other)
        assert not re.search("  |centred of|edge of|(it|everything|:),|: with|(Put|Show) it with", other), other


def test_every_paraphrase_of_every_rule_is_reached() -> None:
    rng, reached = Random(10), [set[str]() for _ in RULES]
    for text in texts(3000):
        for (pattern, ways), those in zip(RULES, reached, strict=True):
            way = rng.choice(ways)
            said = pattern.sub(way, text)
            if said != text:
                those.add(way)
            text = rng.choice((text, said))  # noqa: PLW2901
    for (pattern, ways), those in zip(RULES, reached, strict=True):
        assert those == set(ways), pattern.pattern


def test_half_of_the_captions_are_not_paraphrased() -> None:
    rng, own = Random(9), texts(500)
    kept = sum(paraphrased(text, rng) == text for text in own) / len(own)
    assert 0.5 < kept < 0.65


@pytest.mark.parametrize(("height", "width"), [(128, 128), (256, 256), (128, 512), (512, 160)])
def test_things_do_not_touch_unless_one_is_inside_and_none_leaves_the_picture(height: int, width: int) -> None:
    rng = Random(6)
    white = Background()
    scenes = [replace(sample_scene(rng), background=white) for _ in range(40)]
    for scene in scenes:
        alone = [replace(scene, things=(thing,), relation="middle") for thing in scene.things]
        if scene.relation == "inside":
            continue
        empty = draw([replace(scene, things=())], height, width)
        covered = (draw(alone, height, width) != empty).any(1)
        assert covered.sum(0).max() <= 1
        edges = torch.cat([covered[:, 0], covered[:, -1], covered[:, :, 0], covered[:, :, -1]], 1)
        assert not edges.any()


def test_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    rng = Random(7)
    scenes = [sample_scene(rng) for _ in range(12)]
    together = draw(scenes, 128, 192)
    assert together.dtype == torch.uint8
    assert together.shape == (12, 3, 128, 192)
    for index, scene in enumerate(scenes):
        assert torch.equal(together[index], draw([scene], 128, 192)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_has_its_position_size_and_colour(shape: str) -> None:
    picture = draw([Scene((Thing(shape, "blue", "large", 0.3, 0.6),))], 256, 256)[0].float()
    is_blue = (picture - torch.tensor(COLOURS["blue"])[:, None, None]).abs().amax(0) < 2
    rows, columns = is_blue.nonzero().T.float()
    assert abs(rows.mean() - 0.6 * 256) < 18
    assert abs(columns.mean() - 0.3 * 256) < 18
    assert 0.6 * 0.38 * 256 < columns.max() - columns.min() < 0.39 * 256


@pytest.mark.parametrize("shape", SHAPES)
def test_a_polygon_is_the_same_padded_and_as_a_tensor(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU is given it."""
    x, y = torch.broadcast_tensors(torch.linspace(-1.2, 1.2, 61), torch.linspace(-1.1, 1.3, 47)[:, None])
    own = SHAPE_LAYERS[shape](x, y)
    monkeypatch.setattr(shapes, "polygon", lambda x, y, corners: to_polygon(x, y, torch.tensor(padded(corners))))
    for layer, other in zip(own, SHAPE_LAYERS[shape](x, y), strict=True):
        assert torch.allclose(layer.distance, other.distance, atol=1e-5)


def test_too_many_corners_are_refused() -> None:
    with pytest.raises(ValueError, match="a polygon has 11 corners; allowed: 10 at most"):
        padded([(0.0, float(corner)) for corner in range(11)])


@pytest.mark.parametrize("place", SIGN_PLACES)
@pytest.mark.parametrize("letters", range(1, MAX_LETTERS + 1))
def test_letters_stand_on_codes_alike_from_the_side_where_they_grow_no_more(letters: int, place: str) -> None:
    assert (Size(LETTERED_SIDE, LETTERED_SIDE), CODE_SIDE) == (MAIN_SIZE, PIXELS_PER_TOKEN)
    square = Board.of(letters, place, LETTERED_SIDE, LETTERED_SIDE)
    for height, width in product(range(LETTERED_SIDE, 513, CODE_SIDE), repeat=2):
        board = Board.of(letters, place, height, width)
        assert (board.cell_height, board.cell_width, board.border) == (
            square.cell_height,
            square.cell_width,
            square.border,
        )
        assert board.top - square.top == (height - LETTERED_SIDE if place == "bottom" else 0)
        assert (board.left - square.left) % CODE_SIDE == 0
        assert abs(board.left + letters * board.cell_width / 2 - width / 2) <= CODE_SIDE / 2 + 0.5


@pytest.mark.parametrize("size", [(128, 128), (224, 512), (256, 256), (288, 320), (512, 512)])
@pytest.mark.parametrize("place", SIGN_PLACES)
def test_signs_are_inside_the_band_that_things_leave_free(size: tuple[int, int], place: str) -> None:
    frame = Frame.of(place, *size)
    band = range(frame.top) if place == "top" else range(frame.height, size[0])
    for letters in range(1, MAX_LETTERS + 1):
        board = Board.of(letters, place, *size)
        assert board.top - board.border in band
        assert board.top + board.cell_height + board.border - 1 in band
        assert board.left >= board.border
        assert board.left + letters * board.cell_width + board.border <= size[1]


def test_letters_are_black_on_a_white_board_and_big() -> None:
    nothing = Scene((Thing("circle", "red", "small"),), background=Background("plain", ("light pink",)))
    blank, written = draw([nothing, replace(nothing, sign=Sign("IIIIII"))], 256, 256)
    board = (blank != written).any(0)[200:].nonzero()
    assert len(board)
    rows = written[0, 200:, :].float()
    ink = (rows < 60)[:, 20:236]
    column_heights = ink.sum(0)
    assert (column_heights >= 24).sum() >= 6

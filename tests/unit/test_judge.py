from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from eval.adherence import questions_of, shares
from eval.judge import judge, judge_edit
from eval.questions import Request, edit_questions, rendered, scene_questions
from eval.seeing import connected_pieces, look
from eval.shortcuts import EXACT, SHORTCUTS, Shortcut, devices_from
from eval.similarity import psnr, ssim
from glm_image.errors import ConfigurationError
from glm_image.pipeline import LocalSettings
from train_tiny.world.edits import KINDS, sample_edit
from train_tiny.world.scene import Background, Scene, Sign, Thing, sample_scene

Pixels = NDArray[np.uint8]
SQUARE = Request(256, 256)
PAIR = Scene(
    (Thing("star", "red", "large", 0.27, 0.5), Thing("fox", "blue", "small", 0.72, 0.5)),
    "left of",
    Background("checks", ("light blue", "white")),
    Sign("FOXY"),
)


def blurred(picture: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)))


def noisy(picture: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0, 12, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def compressed(picture: Pixels) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=30)
    return np.asarray(Image.open(buffer))


def shifted(picture: Pixels) -> Pixels:
    return np.pad(picture, ((0, 4), (3, 0), (0, 0)), "edge")[4:, :-3]


def through_a_bottleneck(picture: Pixels) -> Pixels:
    image = Image.fromarray(picture)
    small = image.resize((image.width * 2 // 5, image.height * 2 // 5), Image.Resampling.BICUBIC)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("harm", [np.asarray, blurred, noisy, compressed, shifted, through_a_bottleneck])
def test_drawings_are_judged_right_even_harmed(harm: Callable[[Pixels], Pixels]) -> None:
    questions = scene_questions(12, seed=3)
    result = shares(judge(look(harm(rendered(question.scene, SQUARE))), question.scene) for question in questions)
    assert {name: share for name, share in result.items() if name != "of"} == dict.fromkeys(result["of"], 1.0)


@pytest.mark.full
@pytest.mark.parametrize("size", [(128, 128), (256, 256), (512, 512), (192, 512), (512, 160)])
def test_of_many_drawings_at_least_98_of_100_are_judged_right(size: tuple[int, int]) -> None:
    scenes = [sample_scene(Random(seed)) for seed in range(150)]
    assert shares(judge(look(rendered(scene, Request(*size))), scene) for scene in scenes)["all"] >= 0.98


@pytest.mark.parametrize(
    ("wrong", "painted"),
    [
        ({"colour"}, replace(PAIR, things=(replace(PAIR.things[0], colour="green"), PAIR.things[1]))),
        ({"shape"}, replace(PAIR, things=(replace(PAIR.things[0], shape="heart"), PAIR.things[1]))),
        ({"size"}, replace(PAIR, things=(replace(PAIR.things[0], size="small"), PAIR.things[1]))),
        ({"position"}, replace(PAIR, things=(replace(PAIR.things[0], x=0.72), replace(PAIR.things[1], x=0.27)))),
        ({"background"}, replace(PAIR, background=Background("stripes", ("light blue", "white")))),
        ({"background"}, replace(PAIR, background=Background("checks", ("light pink", "white")))),
        ({"word", "short_word"}, replace(PAIR, sign=Sign("FOXV"))),
        ({"word", "short_word"}, replace(PAIR, sign=Sign("FOX"))),
        ({"count", "colour", "shape", "size", "position"}, replace(PAIR, things=PAIR.things[:1])),
        ({"count", "word", "short_word"}, replace(PAIR, sign=None)),
    ],
)
def test_only_wrong_properties_are_reported(wrong: set[str], painted: Scene) -> None:
    verdict = judge(look(rendered(painted, SQUARE)), PAIR)
    assert {name for name, right in verdict.items() if not right} == wrong | {"all"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_seen_when_it_was_made_and_only_then(kind: str) -> None:
    rng = Random(4)
    for edit in (sample_edit(rng, kind=kind) for _ in range(4)):
        assert judge_edit(look(rendered(edit.after, SQUARE)), edit) == {"changed": True, "kept": True}
        assert not judge_edit(look(rendered(edit.before, SQUARE)), edit)["changed"]


def test_an_edit_that_changes_more_than_requested_did_not_keep_the_rest() -> None:
    rng = Random(5)
    edit = sample_edit(rng, kind="recolour")
    elsewhere = replace(edit.after, background=Background("stripes", ("lavender", "light yellow")))
    assert judge_edit(look(rendered(elsewhere, SQUARE)), edit) == {"changed": True, "kept": False}


def test_questions_are_held_out_and_a_function_of_the_seed() -> None:
    questions = scene_questions(6, seed=1) + edit_questions(6, seed=1)
    assert all(question.scene.held_out for question in questions)
    assert questions == scene_questions(6, seed=1) + edit_questions(6, seed=1)
    assert {question.edit.kind for question in questions if question.edit} == set(KINDS)


def test_paraphrased_questions_are_about_the_same_images() -> None:
    own, others = (
        questions_of(argparse.Namespace(n=20, edits=20, seed=2, other_words=other_words))
        for other_words in (False, True)
    )
    for name, questions in own.items():
        pairs = list(zip(questions, others[name], strict=True))
        assert sum(one.prompt != other.prompt for one, other in pairs) > len(pairs) / 2
        assert all(replace(one, prompt="") == replace(other, prompt="") for one, other in pairs)


def test_pieces_are_joined_around_corners_and_apart_across_gaps() -> None:
    rows = ["##..#", "..#.#", "#...#", "#.#.#", "###.#"]
    pieces = connected_pieces(np.array([[letter == "#" for letter in row] for row in rows]))
    assert len(set(pieces[pieces > 0].tolist())) == 3
    assert pieces[0, 0] == pieces[1, 2]
    assert pieces[2, 0] == pieces[3, 2] != pieces[0, 4]
    assert pieces[0, 2] == 0


def test_similarity_follows_its_definition() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (13, 12, 3), dtype=np.uint8)
    other = np.clip(one.astype(int) + rng.integers(-20, 21, one.shape), 0, 255).astype(np.uint8)
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top, left, channel in np.ndindex(3, 2, 3):
        x = one[top : top + 11, left : left + 11, channel].astype(float)
        y = other[top : top + 11, left : left + 11, channel].astype(float)
        mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
        spread_x, spread_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
        together = (weights * (x - mean_x) * (y - mean_y)).sum()
        light = (2 * mean_x * mean_y + 6.5025) / (mean_x**2 + mean_y**2 + 6.5025)
        values.append(light * (2 * together + 58.5225) / (spread_x + spread_y + 58.5225))
    assert ssim(one, other) == pytest.approx(np.mean(values))
    assert ssim(one, one) == pytest.approx(1)
    assert psnr(np.zeros_like(one), np.full_like(one, 255)) == 0
    assert psnr(np.zeros_like(one), np.full_like(one, 1)) == pytest.approx(48.13, abs=0.01)


@pytest.mark.parametrize(
    ("first", "all_of"), [("cpu", "cpu,cpu"), ("cpu:2", "cpu:2,cpu:3"), ("cuda:0", "cuda:0,cuda:1")]
)
def test_devices_are_counted_on_from_the_first(monkeypatch: pytest.MonkeyPatch, first: str, all_of: str) -> None:
    monkeypatch.setattr("eval.shortcuts.instance_device", lambda devices, _: devices)
    assert devices_from(first, 2) == all_of


def test_the_exact_shortcut_is_the_default_and_an_unknown_setting_is_named() -> None:
    assert SHORTCUTS[EXACT].settings() == LocalSettings()
    assert SHORTCUTS["int8-ar"].settings().ar.quantization == "int8"
    with pytest.raises(ConfigurationError, match="DitSettings has no tempo"):
        Shortcut(dit={"tempo": "allegro"}).settings()

"""The whole space of requests against the engines: each is served right or refused in words."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from glm_image.errors import InvalidInputError
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.metadata import TOKENS
from glm_image.pipeline import GeneratedImages, LocalPipeline
from glm_image.request.images import decode_source
from glm_image.request.limits import OUTPUT_FORMATS, Limits
from glm_image.request.parameters import GenerationParameters
from glm_image.request.stages import Stage

LIMITS = Limits()
SEEDS = st.integers(-(2**63), 2**63 - 1)
ANY_INT = st.integers(-(2**31), 2**31 - 1)
ANY_FLOAT = st.floats(width=32)
# Few tokens, few steps: what varies is what is asked, not how long it takes.
SIDES = st.integers(32, 96)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
QUOTED = st.builds("a sign '{}' and “{}”".format, TEXT, TEXT)

LEGAL: dict[str, st.SearchStrategy[Any]] = {
    "prompt": (TEXT | QUOTED).filter(str.strip),
    "height": SIDES,
    "width": SIDES,
    "num_inference_steps": st.integers(1, 3),
    "guidance_scale": st.floats(0, 20, width=32),
    "seed": SEEDS | st.none(),
    "num_images": st.integers(1, 2),
    "negative_prompt": st.just("") | TEXT | QUOTED,
    "temperature": st.floats(0.01, 2).filter(lambda value: value >= 0.01) | st.none(),
    "top_p": st.floats(0, 1, exclude_min=True) | st.none(),
    "top_k": st.integers(1, 2**31 - 1) | st.none(),
    "output_format": st.sampled_from(OUTPUT_FORMATS),
}
ANY: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=60) | st.sampled_from(["", " ", "a" * 8193, "'a' " * 65, "a\0", "\ud800"]),
    "height": ANY_INT,
    "width": ANY_INT,
    "num_inference_steps": ANY_INT,
    "guidance_scale": ANY_FLOAT,
    "num_images": ANY_INT,
    "negative_prompt": st.text(max_size=60) | st.sampled_from(["a" * 8193, "'a' " * 65, "a\0", "\udfff"]),
    "temperature": ANY_FLOAT,
    "top_p": ANY_FLOAT,
    "top_k": ANY_INT,
    "output_format": st.text(max_size=8),
    "images": st.lists(st.binary(max_size=64), max_size=6).map(tuple),
}
AT_ONCE = 5
SLOW_IS_FINE = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))

RIGHT: dict[str, Any] = {
    "prompt": "x",
    "height": 32,
    "width": 32,
    "num_inference_steps": 1,
    "num_images": 1,
    "seed": 2**63 - 1,
}


@SLOW_IS_FINE
@given(st.lists(st.fixed_dictionaries(LEGAL), min_size=1, max_size=AT_ONCE))
@example(
    [
        {**RIGHT, "num_images": 2},
        {**RIGHT, "prompt": "\u2028\ufeff", "guidance_scale": 1e-38, "top_p": 1e-300},
        {**RIGHT, "height": 33, "width": 95, "output_format": "webp", "top_k": 1},
    ]
)
def test_what_is_legal_is_served_right(pipeline: LocalPipeline, asked: list[dict[str, Any]]) -> None:
    """Requests beside each other, which decode together; their seeds make them again, in other company."""
    made = generate(pipeline, asked)
    seeds = [one.metadata["seeds"][0] for one in made]
    again = generate(pipeline, [{**one, "seed": seed} for one, seed in zip(asked, seeds, strict=True)][::-1])[::-1]
    for one, first, second in zip(asked, made, again, strict=True):
        np.testing.assert_array_equal(first.pixels, second.pixels)
        assert first.encoded == second.encoded
        check(first, one)


def generate(pipeline: LocalPipeline, asked: list[dict[str, Any]]) -> list[GeneratedImages]:
    with ThreadPoolExecutor(AT_ONCE) as clients:
        return list(clients.map(lambda one: pipeline.generate(GenerationParameters(**one), RequestContext()), asked))


def check(made: GeneratedImages, asked: dict[str, Any]) -> None:
    count, height, width = asked["num_images"], asked["height"], asked["width"]
    told = made.metadata
    assert made.pixels.shape == (count, height, width, 3)
    assert made.pixels.dtype == np.uint8
    seeds = told["seeds"]
    assert len(seeds) == count
    assert asked.get("seed") in (None, seeds[0])
    assert seeds == [(seeds[0] + index + 2**63) % 2**64 - 2**63 for index in range(count)]
    assert (told["height"], told["width"], told["steps"]) == (height, width, asked["num_inference_steps"])
    for side, generated in ((height, told["generated_height"]), (width, told["generated_width"])):
        assert generated % 32 == 0
        assert 0 <= generated - side < 32
    assert set(told["seconds"]) == set(Stage)
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    assert set(told["tokens"]) == set(TOKENS)
    assert told["tokens"]["image"] == told["generated_height"] * told["generated_width"] // 32**2
    output_format = asked.get("output_format", "raw")
    assert len(made.encoded) == (0 if output_format == "raw" else count)
    for file, pixels in zip(made.encoded, made.pixels, strict=False):
        limits = Limits(source_bytes=1 << 20, source_decoded_pixels=1 << 20)
        decoded = np.asarray(decode_source(file, "image", limits))
        assert decoded.shape == pixels.shape
        assert output_format != "png" or np.array_equal(decoded, pixels)


def refusal(pipeline: LocalPipeline, asked: dict[str, Any]) -> str | None:
    """The words in which a request is refused, None when it is not."""
    try:
        resolved = pipeline.resolve(GenerationParameters(**{"prompt": "x", **asked}))
    except InvalidInputError as refused:
        return str(refused)
    asked_for, sampling = resolved.parameters, resolved.sampling
    assert all(LIMITS.min_side <= side <= LIMITS.max_side for side in resolved.requested)
    assert 1 <= len(resolved.seeds) <= LIMITS.num_images
    assert asked_for.prompt.strip()
    assert len(asked_for.prompt) <= LIMITS.prompt_characters
    assert np.isfinite([sampling.temperature, sampling.top_p, asked_for.guidance_scale]).all()
    return None


def named(inputs: Iterable[str]) -> tuple[str, ...]:
    return tuple("image" if name == "images" else name for name in inputs)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({}, optional=ANY))
def test_anything_is_resolved_or_refused_in_words(pipeline: LocalPipeline, asked: dict[str, Any]) -> None:
    """Validation alone, so that the whole space can be tried."""
    words = refusal(pipeline, asked)
    if words is not None:
        assert words.startswith(named(asked))
        assert "; allowed: " in words
        assert words.isprintable()


@pytest.mark.parametrize("name", ANY)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_one_wrong_input_is_the_one_that_is_named(pipeline: LocalPipeline, name: str, data: st.DataObject) -> None:
    words = refusal(pipeline, {"height": 32, "width": 32, name: data.draw(ANY[name])})
    assert words is None or words.startswith(named([name]))

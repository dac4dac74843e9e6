"""The whole space of requests against the engines: each is served correctly or refused with a message."""

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
# Few tokens and steps: the inputs vary, not the duration.
SIDES = st.integers(32, 96)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
QUOTED = st.builds("a sign '{}' and “{}”".format, TEXT, TEXT)

VALID_INPUTS: dict[str, st.SearchStrategy[Any]] = {
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
    "glyph_text": st.none() | st.lists(TEXT, max_size=2).map(tuple),
}
ANY_INPUTS: dict[str, st.SearchStrategy[Any]] = {
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
    "glyph_text": st.lists(st.text(max_size=60) | st.sampled_from(["a" * 2048, "a\0", "\ud800"]), max_size=70).map(
        tuple
    ),
}
CONCURRENT = 5
SLOW_IS_FINE = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))

VALID: dict[str, Any] = {
    "prompt": "x",
    "height": 32,
    "width": 32,
    "num_inference_steps": 1,
    "num_images": 1,
    "seed": 2**63 - 1,
}


@SLOW_IS_FINE
@given(st.lists(st.fixed_dictionaries(VALID_INPUTS), min_size=1, max_size=CONCURRENT))
@example(
    [
        {**VALID, "num_images": 2},
        {**VALID, "prompt": "\u2028\ufeff", "guidance_scale": 1e-38, "top_p": 1e-300},
        {**VALID, "height": 33, "width": 95, "output_format": "webp", "top_k": 1},
    ]
)
def test_valid_requests_get_correct_and_reproducible_images(
    pipeline: LocalPipeline, requested: list[dict[str, Any]]
) -> None:
    """Concurrent requests, which decode together; the same seeds in another order give the same images."""
    first_results = generate(pipeline, requested)
    seeds = [result.metadata["seeds"][0] for result in first_results]
    seeded = [{**values, "seed": seed} for values, seed in zip(requested, seeds, strict=True)]
    second_results = generate(pipeline, seeded[::-1])[::-1]
    for values, first, second in zip(requested, first_results, second_results, strict=True):
        np.testing.assert_array_equal(first.pixels, second.pixels)
        assert first.encoded == second.encoded
        check(first, values)


def generate(pipeline: LocalPipeline, requested: list[dict[str, Any]]) -> list[GeneratedImages]:
    with ThreadPoolExecutor(CONCURRENT) as clients:
        return list(
            clients.map(lambda values: pipeline.generate(GenerationParameters(**values), RequestContext()), requested)
        )


def check(result: GeneratedImages, requested: dict[str, Any]) -> None:
    count, height, width = requested["num_images"], requested["height"], requested["width"]
    metadata = result.metadata
    assert result.pixels.shape == (count, height, width, 3)
    assert result.pixels.dtype == np.uint8
    seeds = metadata["seeds"]
    assert len(seeds) == count
    assert requested.get("seed") in (None, seeds[0])
    assert seeds == [(seeds[0] + index + 2**63) % 2**64 - 2**63 for index in range(count)]
    size_and_steps = (metadata["height"], metadata["width"], metadata["steps"])
    assert size_and_steps == (height, width, requested["num_inference_steps"])
    for side, generated in ((height, metadata["generated_height"]), (width, metadata["generated_width"])):
        assert generated % 32 == 0
        assert 0 <= generated - side < 32
    assert set(metadata["seconds"]) == set(Stage)
    assert all(seconds >= 0 for seconds in metadata["seconds"].values())
    assert set(metadata["tokens"]) == {*TOKENS, "steps"}
    assert metadata["tokens"]["image"] == metadata["generated_height"] * metadata["generated_width"] // 32**2
    output_format = requested.get("output_format", "raw")
    assert len(result.encoded) == (0 if output_format == "raw" else count)
    for file, pixels in zip(result.encoded, result.pixels, strict=False):
        limits = Limits(source_bytes=1 << 20, source_decoded_pixels=1 << 20)
        decoded = np.asarray(decode_source(file, "image", limits))
        assert decoded.shape == pixels.shape
        assert output_format != "png" or np.array_equal(decoded, pixels)


def refusal(pipeline: LocalPipeline, requested: dict[str, Any]) -> str | None:
    """Returns the message of a refusal, None if the request is valid."""
    try:
        resolved = pipeline.resolve(GenerationParameters(**{"prompt": "x", **requested}))
    except InvalidInputError as refused:
        return str(refused)
    parameters, sampling = resolved.parameters, resolved.sampling
    assert all(LIMITS.min_side <= side <= LIMITS.max_side for side in resolved.requested)
    assert 1 <= len(resolved.seeds) <= LIMITS.num_images
    assert parameters.prompt.strip()
    assert len(parameters.prompt) <= LIMITS.prompt_characters
    assert np.isfinite([sampling.temperature, sampling.top_p, parameters.guidance_scale]).all()
    return None


def named(inputs: Iterable[str]) -> tuple[str, ...]:
    return tuple("image" if name == "images" else name for name in inputs)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({}, optional=ANY_INPUTS))
def test_any_request_is_resolved_or_refused_with_a_message(pipeline: LocalPipeline, requested: dict[str, Any]) -> None:
    """Validation alone, so that the whole space can be tried."""
    message = refusal(pipeline, requested)
    if message is not None:
        assert message.startswith(named(requested))
        assert "; allowed: " in message
        assert message.isprintable()


@pytest.mark.parametrize("name", ANY_INPUTS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_refusal_names_the_invalid_input(pipeline: LocalPipeline, name: str, data: st.DataObject) -> None:
    message = refusal(pipeline, {"height": 32, "width": 32, name: data.draw(ANY_INPUTS[name])})
    assert message is None or message.startswith(named([name]))

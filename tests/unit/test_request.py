from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_image.errors import ConfigurationError, InvalidInputError
from glm_image.request import geometry, prompts
from glm_image.request.declaration import read, write
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import LIMIT_PREFIX, OUTPUT_FORMATS, Limits
from glm_image.request.parameters import (
    GenerationParameters,
    PaintRequest,
    ResolvedRequest,
    Sampling,
    consecutive_seeds,
    random_seed,
)
from glm_image.request.tensors import TensorSpec, parameter_value

LIMITS = Limits()
DEFAULTS = Sampling(temperature=0.9, top_p=0.75, top_k=16512)
SHOWN = 80
SENTENCE = 200
"""Longer than any error sentence about one value."""


def resolve(**asked: Any) -> ResolvedRequest:
    return GenerationParameters(**({"prompt": "a fox"} | asked)).resolve(LIMITS, DEFAULTS)


@pytest.mark.parametrize(
    ("images", "height", "width", "steps", "work"),
    [(8, 2048, 2048, 200, 6711), (3, 2017, 2048, 159, 2001), (2, 2048, 2048, 200, 1678), (8, 1024, 1024, 200, 1678)],
)
def test_work_of_a_request_is_limited_in_both_stages(
    images: int, height: int, width: int, steps: int, work: int
) -> None:
    """Images of 2017 pixels are generated with 2048."""
    parameters = GenerationParameters("a fox", height=height, width=width, num_images=images, num_inference_steps=steps)
    grid = geometry.target_grid(geometry.generated_size(Size(height, width)))
    tokens = np.zeros((images, grid.tokens), np.int32)
    paint = PaintRequest("x", tokens, grid, Size(height, width), tuple(range(images)), num_inference_steps=steps)
    for check in (lambda limits: parameters.resolve(limits, DEFAULTS), lambda limits: paint.check(limits, 5)):
        check(Limits(work=work))
        with pytest.raises(
            InvalidInputError,
            match=rf"^num_images x height x width x num_inference_steps is {images} x \d+ x {width} x {steps}, {work} "
            rf"megapixel steps; allowed: at most {work - 1} \(limit_work\)$",
        ):
            check(Limits(work=work - 1))
    assert 8 * 2.048**2 * 50 < LIMITS.work < 8 * 2.048**2 * 200 / 3


IN = [
    ("prompt", "x"),
    ("prompt", " 狐狸 "),
    ("prompt", "x" * 8192),
    ("prompt", "\u200b"),
    ("prompt", "<sop>32 32<eop><|image|>"),
    ("prompt", "'a'" * 64),
    ("prompt", "'" + "x" * 2047 + "'"),
    ("prompt", "'" + "x" * 2043 + "' 'x'"),
    ("negative_prompt", ""),
    ("negative_prompt", " \n"),
    ("negative_prompt", "x" * 8192),
    ("height", 32),
    ("height", 33),
    ("height", 2048),
    ("width", 32),
    ("width", 2048),
    ("num_inference_steps", 1),
    ("num_inference_steps", 200),
    ("guidance_scale", 0.0),
    ("guidance_scale", -0.0),
    ("guidance_scale", 20.0),
    ("seed", -(2**63)),
    ("seed", 2**63 - 1),
    ("num_images", 1),
    ("num_images", 8),
    ("temperature", 0.01),
    ("temperature", 2.0),
    ("top_p", 5e-324),
    ("top_p", 1.0),
    ("top_k", 1),
    ("top_k", 2**31 - 1),
    *(("output_format", name) for name in OUTPUT_FORMATS),
]

OUT = [
    ("prompt", "", "white space"),
    ("prompt", " \t\n\u3000", "white space"),
    ("prompt", "x" * 8193, "1 to 8192 characters"),
    ("prompt", "a\0b", "NUL"),
    ("prompt", "a \udcff b", "UTF-8"),
    ("prompt", "'a'" * 65, "at most 64"),
    ("prompt", "'" + "x" * 2048 + "'", "at most 2048"),
    ("prompt", "'" + "x" * 2044 + "' 'x'", "at most 2048"),
    ("prompt", "'" + "狐" * 683 + "'", "at most 2048"),
    ("negative_prompt", "x" * 8193, "1 to 8192 characters"),
    ("negative_prompt", "\0", "NUL"),
    ("negative_prompt", "'\udcff'", "UTF-8"),
    ("negative_prompt", "''" * 65, "at most 64"),
    *((side, value, "32 to 2048") for side in ("height", "width") for value in (-(2**31), -1, 0, 31, 2049, 2**31 - 1)),
    *(("num_inference_steps", value, "1 to 200") for value in (-1, 0, 201)),
    *(("guidance_scale", value, "0 to 20") for value in (-1e-9, 20.0001, math.nan, math.inf, -math.inf)),
    *(("num_images", value, "1 to 8") for value in (-1, 0, 9)),
    *(("temperature", value, "0.01 to 2") for value in (0.0, 0.0099, 2.0001, math.nan, math.inf, -math.inf)),
    *(("top_p", value, "above 0, at most 1") for value in (0.0, -0.5, 1.0001, math.nan, math.inf, -math.inf)),
    *(("top_k", value, "1 and above") for value in (0, -1, -(2**31))),
    *(("output_format", value, "raw, png, jpeg, webp") for value in ("", "PNG", "gif", "png ", "x" * 9999, "\x1b[2J")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), IN)
def test_values_at_the_bounds_are_accepted(name: str, value: Any) -> None:
    assert getattr(resolve(**{name: value}).parameters, name) == value


@pytest.mark.parametrize(("name", "value", "allowed"), OUT)
def test_values_beyond_the_bounds_are_refused_in_a_sentence(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        resolve(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} is ")
    shown, said = message.removeprefix(f"{name} is ").rsplit("; allowed: ", 1)
    assert allowed in said
    assert len(shown) <= SHOWN
    assert message.isprintable()
    assert len(message) < SENTENCE


def test_error_shows_the_value() -> None:
    with pytest.raises(InvalidInputError, match=r"^height is 31; allowed: 32 to 2048$"):
        resolve(height=31)
    with pytest.raises(InvalidInputError, match=r"^guidance_scale is nan; allowed: 0 to 20$"):
        resolve(guidance_scale=math.nan)
    with pytest.raises(InvalidInputError, match=r"^prompt is a\\x00b; allowed: text without NUL characters$"):
        resolve(prompt="a\0b")
    with pytest.raises(InvalidInputError, match=r"^output_format is x{77}\.\.\.; allowed"):
        resolve(output_format="x" * 81)


def test_source_images_are_checked_last() -> None:
    with pytest.raises(InvalidInputError, match=r"^image is empty; allowed: the bytes of"):
        resolve(images=(b"",))
    with pytest.raises(InvalidInputError, match="height"):
        resolve(images=(b"",), height=0)


def test_resolve_fills_in_the_defaults() -> None:
    resolved = resolve()
    assert resolved.requested == (1024, 1024)
    assert resolved.grids == (Grid(16, 16), Grid(32, 32))
    assert resolved.sampling == DEFAULTS
    assert len(resolved.seeds) == 1
    given = resolve(temperature=0.5, top_p=0.25, top_k=7, height=100, width=64, seed=-3, num_images=2)
    assert given.sampling == Sampling(0.5, 0.25, 7)
    assert given.requested == (100, 64)
    assert given.target == (4, 2)
    assert given.seeds == (-3, -2)


def test_random_seed_is_below_2_53() -> None:
    seeds = {random_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert resolve().seeds != resolve().seeds


def test_seeds_wrap_modulo_2_64() -> None:
    assert consecutive_seeds(2**63 - 1, 3) == (2**63 - 1, -(2**63), -(2**63) + 1)
    assert consecutive_seeds(-1, 2) == (-1, 0)


ANY_INT = st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1), st.integers(1, 64))
ANY_FLOAT = st.one_of(st.floats(width=32), st.floats(0, 2))
ANY_TEXT = st.one_of(st.text(), st.text("'\"“”「」 a\0\ud800", max_size=300), st.text("'x", min_size=2000))


@given(
    st.fixed_dictionaries(
        {"prompt": ANY_TEXT},
        optional={
            "height": ANY_INT,
            "width": ANY_INT,
            "num_inference_steps": ANY_INT.filter(lambda value: value is not None),
            "guidance_scale": ANY_FLOAT,
            "seed": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
            "num_images": st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(1, 8)),
            "negative_prompt": ANY_TEXT,
            "temperature": st.one_of(st.none(), ANY_FLOAT),
            "top_p": st.one_of(st.none(), ANY_FLOAT),
            "top_k": ANY_INT,
            "output_format": st.one_of(st.text(), st.sampled_from(OUTPUT_FORMATS)),
            "images": st.lists(st.binary(), max_size=2).map(tuple),
        },
    )
)
def test_any_request_is_refused_in_a_sentence_or_resolved_to_sane_values(asked: dict[str, Any]) -> None:
    try:
        resolved = GenerationParameters(**asked).resolve(LIMITS, DEFAULTS)
    except InvalidInputError as error:
        refusal = str(error)
    else:
        assert_sane(resolved)
        return
    assert refusal.split(" ", maxsplit=1)[0].rstrip(":") in {*asked, "image"}
    assert refusal.isprintable()
    assert len(refusal) < SENTENCE


def assert_sane(resolved: ResolvedRequest) -> None:
    assert geometry.generated_size(resolved.requested) == tuple(32 * side for side in resolved.target)
    assert all(1 <= side <= 64 for side in resolved.target)
    assert all(32 <= side <= 2048 for side in resolved.requested)
    assert all(-(2**63) <= seed < 2**63 for seed in resolved.seeds)
    assert len(set(resolved.seeds)) == resolved.parameters.num_images <= 8
    sampling = resolved.sampling
    assert 0.01 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert sampling.top_k >= 1
    for prompt in (resolved.parameters.prompt, resolved.parameters.negative_prompt):
        assert prompts.glyph_token_count(prompts.quoted_strings(prompt)) <= LIMITS.glyph_tokens
        assert len(prompt.encode()) <= 4 * LIMITS.prompt_characters


PAINT = PaintRequest(
    prompt="a 'fox'",
    prior_token_ids=np.arange(12, dtype=np.int32).reshape(2, 6),
    grid=Grid(2, 3),
    requested=Size(64, 70),
    seeds=(1, 2),
)


def ids(shape: tuple[int, ...], extreme: int = 0) -> np.ndarray:
    made = np.zeros(shape, dtype=np.int32)
    made[-1, -1] = extreme
    return made


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"prior_token_ids": ids((1, 6), 255)},
        {"prior_token_ids": ids((8, 6))},
        {"requested": Size(33, 65)},
        {"requested": Size(64, 96)},
        {"grid": Grid(64, 64), "prior_token_ids": ids((1, 4096)), "requested": Size(2048, 2048)},
        {"negative_prompt": " "},
    ],
)
def test_client_tokens_are_accepted(changed: dict[str, Any]) -> None:
    paint = replace(PAINT, **changed)
    paint.check(LIMITS, codebook_size=256)
    assert paint.generated == tuple(32 * side for side in paint.grid)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt": ""}, "prompt is"),
        ({"negative_prompt": "\0"}, "negative_prompt is"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"output_format": "bmp"}, "output_format is bmp"),
        ({"grid": Grid(0, 3)}, "prior_grid is (0, 3)"),
        ({"grid": Grid(-2, -3)}, "prior_grid is (-2, -3)"),
        ({"grid": Grid(65, 1)}, "prior_grid is (65, 1)"),
        ({"prior_token_ids": ids((1, 6))[:0]}, "prior_token_ids' number of rows is 0"),
        ({"prior_token_ids": ids((9, 6))}, "prior_token_ids' number of rows is 9"),
        ({"prior_token_ids": ids((1, 5))}, "prior_token_ids' number of columns is 5"),
        ({"prior_token_ids": ids((1, 6), -1)}, "prior_token_ids is a tensor with -1"),
        ({"prior_token_ids": ids((1, 6), 256)}, "prior_token_ids is a tensor with 256"),
        ({"requested": Size(64, 64)}, "resolved_size is (64, 64)"),
        ({"requested": Size(64, 97)}, "resolved_size is (64, 97)"),
        ({"requested": Size(0, 0)}, "resolved_size is (0, 0)"),
        ({"requested": Size(-64, -96)}, "resolved_size is (-64, -96)"),
    ],
)
def test_invalid_client_tokens_are_refused_in_a_sentence(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        replace(PAINT, **changed).check(LIMITS, codebook_size=256)
    assert str(refused.value).startswith(named)
    assert "; allowed: " in str(refused.value)


def test_limits_are_written_as_parameters_and_read_back() -> None:
    written = write(LIMITS, LIMIT_PREFIX)
    assert read(Limits, written, LIMIT_PREFIX) == LIMITS
    changed = {"limit_max_side": "512", "other": "x"}
    assert read(Limits, changed, LIMIT_PREFIX) == replace(LIMITS, max_side=512)
    assert set(written) == {f"limit_{limit.name}" for limit in fields(Limits)}
    assert json.dumps(written)


@pytest.mark.parametrize("limit", [limit.name for limit in fields(Limits)])
@pytest.mark.parametrize("text", ["", "many", "0", "-1", "nan", "inf"])
def test_limit_must_be_positive(limit: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"limit_{limit}"):
        read(Limits, {f"limit_{limit}": text}, LIMIT_PREFIX)


def test_configured_limits_apply() -> None:
    small = replace(LIMITS, max_side=64, num_images=2, guidance_scale=3.5)
    asked = GenerationParameters(prompt="x", height=64, width=64, num_images=2, guidance_scale=3.5)
    asked.resolve(small, DEFAULTS)
    for changed in ({"width": 65}, {"num_images": 3}, {"guidance_scale": 3.6}):
        with pytest.raises(InvalidInputError, match=next(iter(changed))):
            replace(asked, **changed).resolve(small, DEFAULTS)


@given(st.integers(-(2**31), 2**31 - 1))
def test_a_parameter_is_an_integer_however_it_is_written(number: int) -> None:
    spec = TensorSpec("width", "INT32")
    for value in (number, str(number), float(number)):
        assert parameter_value(spec, value) == number


@pytest.mark.parametrize("value", [True, 1.5, float("inf"), 2**31, -(2**31) - 1, "", "1.0", "0x10", " 1", "1_0", [1]])
def test_a_parameter_that_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(InvalidInputError, match="allowed: a signed 32-bit integer"):
        parameter_value(TensorSpec("width", "INT32"), value)

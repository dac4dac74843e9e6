"""The text that an image shows as lettering: the quoted text of the prompt, or strings that are named outright."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_image.errors import InvalidInputError
from glm_image.pipeline import LocalPipeline
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import DEFAULT_LIMITS
from glm_image.request.parameters import GenerationParameters, PaintRequest, Sampling
from glm_image_client.calls import accidental_text, request_tensors
from glm_image_client.errors import BadArgumentError

ACCIDENT = "The dog doesn't like the cat's toy"
QUOTED = "The dog with a sign 'STOP'"


def painted(pipeline: LocalPipeline, prompt: str, glyph_text: tuple[str, ...] | None = None) -> NDArray[np.uint8]:
    tokens = np.arange(4, dtype=np.int32)[None]
    request = PaintRequest(prompt, tokens, Grid(2, 2), Size(64, 64), (3,), num_inference_steps=2, glyph_text=glyph_text)
    result = pipeline.paint(request)
    assert result.metadata["rendered_text"] == list(request.rendered_text)
    return result.pixels


def test_named_strings_replace_the_quoted_text(pipeline: LocalPipeline) -> None:
    expected = painted(pipeline, QUOTED)
    for prompt in ("a dog", ACCIDENT, QUOTED, "a 'sign'"):
        np.testing.assert_array_equal(painted(pipeline, prompt, ("STOP",)), expected)
    np.testing.assert_array_equal(painted(pipeline, QUOTED, ()), painted(pipeline, "a dog"))
    assert not np.array_equal(painted(pipeline, QUOTED), painted(pipeline, "a dog"))
    two = painted(pipeline, "a 'x' and \"y\"")
    np.testing.assert_array_equal(painted(pipeline, "a dog", ("x", "y")), two)


def test_apostrophes_letter_as_in_the_reference_and_the_metadata_tells(pipeline: LocalPipeline, reference: Any) -> None:
    assert reference.get_glyph_texts(ACCIDENT)[0] == ["t like the cat"]
    parameters = GenerationParameters(prompt=ACCIDENT, height=32, width=32, seed=1, num_inference_steps=1)
    assert pipeline.generate(parameters).metadata["rendered_text"] == ["t like the cat"]


@pytest.mark.parametrize(
    ("strings", "sentence"),
    [
        (("x",) * 65, "glyph_text is 65 strings; allowed: at most 64"),
        (("x" * 2048,), "glyph_text is strings with 2049 tokens in all; allowed: at most 2048"),
        (("ok", "a\0"), r"glyph_text is a\x00; allowed: text without NUL characters"),
        (("\ud800",), r"glyph_text is \ud800; allowed: UTF-8"),
    ],
)
def test_strings_beyond_the_limits_are_refused(strings: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{re.escape(sentence)}$"):
        GenerationParameters(prompt="x", glyph_text=strings).resolve(DEFAULT_LIMITS, Sampling(1, 1, 1))


def test_the_quoted_text_of_the_prompt_is_not_limited_where_strings_are_named() -> None:
    prompt = "'a' " * 65
    resolved = GenerationParameters(prompt=prompt, glyph_text=()).resolve(DEFAULT_LIMITS, Sampling(1, 1, 1))
    assert resolved.parameters.rendered_text == ()


@pytest.mark.parametrize(
    ("prompt", "accidents"),
    [
        (ACCIDENT, ["t like the cat"]),
        ("a dog's sign 'STOP'", ["s sign "]),
        ("rock 'n' roll", []),
        (QUOTED, []),
        ("it’s a dog’s “sign”", []),
        ("don't", []),
    ],
)
def test_text_between_two_apostrophes_is_probably_an_accident(prompt: str, accidents: list[str]) -> None:
    rendered = GenerationParameters(prompt=prompt).rendered_text
    assert accidental_text(prompt, rendered) == accidents
    assert accidental_text(prompt, ("STOP",)) == []


@pytest.mark.parametrize(
    ("given", "sent"), [(["a", "ü"], [b"a", "ü".encode()]), ("NEWS", [b"NEWS"]), ((), []), ([""], [b""])]
)
def test_the_client_sends_the_strings(given: Any, sent: list[bytes]) -> None:
    (tensor,) = request_tensors({"glyph_text": given})
    assert (tensor.datatype, tensor.data.shape, list(tensor.data)) == ("BYTES", (len(sent),), sent)


@pytest.mark.parametrize("given", [5, [5], [None], ["\ud800"]])
def test_what_is_no_text_is_refused_by_the_client(given: Any) -> None:
    with pytest.raises(BadArgumentError, match=r"^glyph_text is .*; allowed: text that UTF-8 can hold$"):
        request_tensors({"glyph_text": given})

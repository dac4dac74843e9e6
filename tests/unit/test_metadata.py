"""The metadata of the AR, and what a client may send in its place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glm_image.errors import InvalidInputError
from glm_image.lifecycle.context import LATEST_DEADLINE_NS, RequestContext
from glm_image.lifecycle.metadata import TOKENS, ar_metadata, read_ar_metadata
from glm_image.request.stages import STAGE_ORDER, Stage


def test_the_metadata_of_the_ar_is_read() -> None:
    context = RequestContext()
    context.add_seconds(Stage.PREFILL, 0.25)
    metadata = ar_metadata(context, dict.fromkeys(TOKENS, 3))
    assert read_ar_metadata(json.dumps(metadata)) == metadata


@pytest.mark.parametrize("text", ["", "{}", '{"seeds": [1], "seconds": {}, "tokens": {}}', '{"finished_ns": 0}'])
def test_entries_may_be_missing_or_unknown(text: str) -> None:
    assert read_ar_metadata(text) == (json.loads(text) if text else {})


@pytest.mark.parametrize("text", ["[]", "5", "null", "x", '{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_metadata_must_be_an_object(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^ar_metadata is .*; allowed: a JSON object$"):
        read_ar_metadata(text)


@pytest.mark.parametrize("value", ["abc", None, [], {}, True, -1, float("nan"), float("inf"), 10**400, 2**63])
@pytest.mark.parametrize("name", ["seconds", "tokens"])
def test_numbers_are_checked(name: str, value: Any) -> None:
    key = {"seconds": STAGE_ORDER, "tokens": TOKENS}[name][1]
    with pytest.raises(InvalidInputError, match=f"^ar_metadata's {name} is .*; allowed: an object of .*{key}"):
        read_ar_metadata(json.dumps({name: {key: value}}))


@pytest.mark.parametrize("value", ["now", -1, 1.5, True, 2**63, None])
def test_finished_ns_is_checked(value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^ar_metadata's finished_ns is .*; allowed: a whole number"):
        read_ar_metadata(json.dumps({"finished_ns": value}))


def test_a_timeout_of_centuries_fits_its_tensor() -> None:
    assert RequestContext.with_timeout("x", 2**64 - 1).deadline_ns == LATEST_DEADLINE_NS

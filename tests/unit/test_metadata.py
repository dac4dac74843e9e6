"""The metadata of the AR, and what a client may send in its place."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from glm_image.errors import InvalidInputError
from glm_image.lifecycle.context import LATEST_DEADLINE_NS, RequestContext
from glm_image.lifecycle.metadata import TOKENS, ar_metadata, queued_seconds, read_ar_metadata
from glm_image.request.parameters import ArMetadata, Sampling
from glm_image.request.stages import STAGE_ORDER, Stage


def test_the_metadata_of_the_ar_is_read() -> None:
    context = RequestContext()
    context.add_seconds(Stage.PREFILL, 0.25)
    metadata = ar_metadata(
        context, dict.fromkeys(TOKENS, 3), (5, 6), Sampling(1.0, 0.9, 2**31 - 1), {"quantization": "none"}
    )
    assert read_ar_metadata(json.dumps(metadata)) == metadata


@pytest.mark.parametrize("text", ["", "{}", '{"seeds": [1], "seconds": {}, "tokens": {}}', '{"finished_ns": 0}'])
def test_entries_may_be_missing_or_unknown(text: str) -> None:
    assert read_ar_metadata(text) == (json.loads(text) if text else {})


@pytest.mark.parametrize("text", ["[]", "5", "null", "x", '{"a":' * 10_000, '{"a": ' + "9" * 10_000 + "}"])
def test_metadata_must_be_an_object(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^ar_metadata is .*; allowed: a JSON object$"):
        read_ar_metadata(text)


@pytest.mark.parametrize("value", ["abc", None, [], {}, True, -1, float("nan"), float("inf"), 10**400, 2**63, 1e308])
@pytest.mark.parametrize("name", ["seconds", "tokens"])
def test_numbers_are_checked(name: str, value: Any) -> None:
    key = {"seconds": STAGE_ORDER, "tokens": TOKENS}[name][1]
    with pytest.raises(InvalidInputError, match=f"^ar_metadata's {name} is .*; allowed: an object of .*{key}"):
        read_ar_metadata(json.dumps({name: {key: value}}))


@pytest.mark.parametrize("value", [5, None, {}, ["5"], [-1], [True], [2**63], [[1]]])
def test_steps_are_checked(value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^ar_metadata's tokens is .*; allowed: .* a list of them for steps$"):
        read_ar_metadata(json.dumps({"tokens": {"steps": value}}))


@pytest.mark.parametrize("value", ["now", -1, 1.5, True, 2**63, None, 2**63 - 1])
@pytest.mark.parametrize("name", ["arrived_ns", "finished_ns"])
def test_times_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^ar_metadata's {name} is .*; allowed: a time .* that has passed"):
        read_ar_metadata(json.dumps({name: value}))
    assert read_ar_metadata(json.dumps({name: time.monotonic_ns()}))


@pytest.mark.parametrize("request_id", ["", 5, None, "x" * 257, "\ud800"])
def test_request_id_is_checked(request_id: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^ar_metadata's request_id is .*; allowed: "):
        read_ar_metadata(json.dumps({"request_id": request_id}))


def test_long_metadata_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(InvalidInputError, match=r"^ar_metadata is 65537 characters long; allowed: at most 65536$"):
        read_ar_metadata("x" * 65537)


def test_queue_seconds_are_at_most_those_since_the_stage_was_idle() -> None:
    second = 1_000_000_000
    now = time.monotonic_ns()
    assert queued_seconds({"finished_ns": now - 9 * second}) >= 9
    made_up: ArMetadata = {"finished_ns": 0}
    assert 2 <= queued_seconds(made_up, now - 2 * second) < now / second
    assert queued_seconds({"finished_ns": now - 2 * second}, now - 5 * second) >= 2
    assert queued_seconds({}, now - 5 * second) == 0


def test_a_timeout_of_centuries_fits_its_tensor() -> None:
    assert RequestContext.with_timeout("x", 2**64 - 1).deadline_ns == LATEST_DEADLINE_NS

"""The timeout of a request, from both places where Triton leaves it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_image.errors import InvalidInputError
from glm_image.lifecycle.timeouts import END_US, Timeouts, requested_timeout_us

JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.lists(st.none())


@pytest.mark.parametrize(
    ("default", "longest", "requested", "expected"),
    [(0, 0, 0, 0), (0, 0, 7, 7), (5, 0, 0, 5), (5, 0, 7, 7), (0, 9, 0, 9), (5, 9, 0, 5), (5, 9, 11, 9), (5, 9, 7, 7)],
)
def test_a_timeout_has_a_default_and_a_maximum(default: int, longest: int, requested: int, expected: int) -> None:
    assert Timeouts(default, longest).of(requested) == expected


@pytest.mark.parametrize(
    ("timeout_us", "parameters", "expected"),
    [
        (0, "{}", 0),
        (0, '{"other": "x"}', 0),
        (0, '{"timeout": 0}', 0),
        (0, '{"timeout": 300000}', 300_000),
        (0, '{"timeout": "300000"}', 300_000),
        (0, '{"timeout": 3e5}', 300_000),
        (7, '{"timeout": 300000}', 7),
        (END_US - 1, "{}", END_US - 1),
    ],
)
def test_a_timeout_is_a_field_of_the_request_or_a_parameter(timeout_us: int, parameters: str, expected: int) -> None:
    assert requested_timeout_us(timeout_us, json.loads(parameters)) == expected


@pytest.mark.parametrize(
    ("parameter", "shown"),
    [
        (True, "true"),
        (-5, "-5"),
        (1.5, "1.5"),
        (float("nan"), "NaN"),
        (1e30, "1e+30"),
        ("", '""'),
        ("soon", '"soon"'),
        ("-5", '"-5"'),
        ("5 s", '"5 s"'),
        ("٣", r'"\u0663"'),
        ([1], "[1]"),
        (None, "null"),
        (END_US, "9223372036854775808"),
    ],
)
def test_what_is_no_whole_number_is_refused(parameter: Any, shown: str) -> None:
    sentence = f"timeout is {shown}; allowed: a whole number of microseconds from 0 (no limit) to 2^63 - 1"
    with pytest.raises(InvalidInputError, match=f"^{re.escape(sentence)}$"):
        requested_timeout_us(0, json.loads(json.dumps({"timeout": parameter})))


def test_a_negative_timeout_that_triton_read_as_unsigned_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^timeout is 18446744073709551611; allowed"):
        requested_timeout_us(2**64 - 5, {})


@given(JSON_VALUES)
def test_every_value_is_an_allowed_timeout_or_refused(value: Any) -> None:
    try:
        timeout = requested_timeout_us(0, json.loads(json.dumps({"timeout": value})))
    except InvalidInputError as error:
        refusal = str(error)
    else:
        assert 0 <= timeout < END_US
        assert not isinstance(value, bool)
        assert float(value) == timeout
        return
    assert refusal.isprintable()
    assert len(refusal) < 200

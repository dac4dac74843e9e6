"""What a client sends besides tensors: ids, timeouts and parameters, of which none may break a stage."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_image.errors import InvalidInputError
from glm_image.lifecycle.call_header import CallHeader
from glm_image.lifecycle.context import LATEST_DEADLINE_NS
from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.request.request_id import MAX_BYTES
from glm_image_client.calls import MAX_ID_BYTES, control, generate
from glm_image_client.errors import BadArgumentError

OPTIONS = StreamOptions(arrived_ns=5, previews=True, latent_preview_every=3)


@dataclass
class Request:
    """Triton's request, whose methods decode what a client sent."""

    id: bytes = b""
    microseconds: int = 0
    text: bytes = b"{}"

    def request_id(self) -> str:
        return self.id.decode()

    def timeout(self) -> int:
        return self.microseconds

    def parameters(self) -> str:
        return self.text.decode()


def header(parameters: Any = None, request_id: str = "", timeout: int = 0) -> CallHeader:
    return CallHeader.read(Request(request_id.encode(), timeout, json.dumps(parameters or {}).encode()))


@pytest.mark.parametrize("request_id", ["", "a", "x" * 256, "é" * 128, "a\nb\u2028"])
def test_ids_of_up_to_256_bytes_are_kept(request_id: str) -> None:
    assert header(request_id=request_id).id == request_id


@pytest.mark.parametrize(
    ("request_id", "sentence"),
    [
        (b"x" * 257, "request id is 257 bytes long; allowed: at most 256 bytes of UTF-8"),
        ("é".encode() * 129, "request id is 258 bytes long; allowed: at most 256 bytes of UTF-8"),
        (b"fox \xff\n", r"request id is fox \xff\n; allowed: UTF-8"),
        (b"\xed\xa0\x80" * 1_000_000, r"request id is " + 6 * r"\xed\xa0\x80"),
    ],
)
def test_other_ids_are_refused_in_words(request_id: bytes, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{re.escape(sentence)}") as refused:
        CallHeader.read(Request(request_id))
    assert len(str(refused.value)) < 200
    assert str(refused.value).isprintable()
    assert refused.value.__context__ is None or refused.value.__suppress_context__


@given(st.binary(max_size=300), st.text(st.characters(codec="utf-8"), max_size=99) | st.binary(max_size=99))
def test_any_id_and_parameters_are_read_or_refused(request_id: bytes, value: str | bytes) -> None:
    sent = value.encode() if isinstance(value, str) else value
    escaped = bytes(byte for byte in sent if byte >= ord(" ") and byte not in b'"\\')  # Triton escapes what it must
    text = b'{"timeout": 5, "other": "' + escaped + b'"}'
    try:
        assert CallHeader.read(Request(request_id, 7, text)) == CallHeader(request_id.decode(), 7)
    except InvalidInputError as error:
        refusal = str(error)
    else:
        refusal = "request id is; allowed: "
    assert refusal.startswith(("request id is", "request parameters is"))
    assert "; allowed: " in refusal


def test_clients_refuse_the_same_ids() -> None:
    assert MAX_ID_BYTES == MAX_BYTES
    for request_id in ("x" * 257, "é" * 129, "\ud800"):
        with pytest.raises(BadArgumentError, match=r"^request_id is .*; allowed: .*UTF-8"):
            control("cancel", request_id, None)
        with pytest.raises(BadArgumentError, match=r"^request_id is "):
            generate("a fox", request_id=request_id)
    assert generate("a fox", request_id="x" * 256).request_id == "x" * 256


def test_timeout_of_generate_is_a_parameter() -> None:
    assert header(timeout=3).timeout_us == 3
    assert header({"timeout": 4}).timeout_us == 4
    assert header({"other": 4}).timeout_us == 0
    for value in (-1, True, "soon", 1.5, 2**63, [1]):
        with pytest.raises(InvalidInputError, match=r"^timeout is .*; allowed: a whole number of microseconds"):
            header({"timeout": value})


def test_stream_options_travel_as_a_request_parameter() -> None:
    assert header({**OPTIONS.parameters(), "other": 1}).options == OPTIONS
    assert header({"other": 1}).options == StreamOptions()


@pytest.mark.parametrize("value", [5, "5", "{", "[1]", [], "[" * 900, json.dumps({"previews": True}) + " " * 2000])
def test_stream_options_that_are_no_object_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^stream_options is .*; allowed: what glm_image_stream sends"):
        header({"stream_options": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("arrived_ns", value) for value in (-1, True, 1.5, "1", LATEST_DEADLINE_NS, LATEST_DEADLINE_NS + 1)),
        *(("latent_preview_every", value) for value in (-1, True, 1.5, "1", 201, None)),
        *(("previews", value) for value in (1, None, "true")),
        *(("trace", value) for value in (1, {}, "x" * 801)),
        ("lunch", 1),
    ],
)
def test_made_up_stream_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^stream_options's {name} is .*; allowed: "):
        header({"stream_options": json.dumps({name: value})})


def test_arrival_of_a_stream_has_passed() -> None:
    now = time.monotonic_ns()
    assert header({"stream_options": json.dumps({"arrived_ns": now})}).options.arrived_ns == now
    with pytest.raises(InvalidInputError, match=r"arrived_ns is \d+; allowed: null, or a time .* that has passed"):
        header({"stream_options": json.dumps({"arrived_ns": time.monotonic_ns() + 10**12})})


def test_parameters_without_a_meaning_are_not_parsed() -> None:
    assert CallHeader.read(Request(text=b"")) == CallHeader()
    assert CallHeader.read(Request(text=b'{"a": ' + b"[" * 10**6)) == CallHeader()
    with pytest.raises(
        InvalidInputError, match=r"^request parameters is \d+ characters long; allowed: at most 65536 with"
    ):
        CallHeader.read(Request(text=b'{"timeout": 1' + b" " * 70_000 + b"}"))

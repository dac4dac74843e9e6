"""Values that no input may have, each over gRPC, HTTP with binary data and HTTP with JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from bad_input.wire import Case, binary_send, grpc_send, http_send, json_body, json_input, tensor, with_small

SMALLEST, LARGEST = -(2**31), 2**31 - 1
CHARACTERS = "1 to 8192 characters"
SIDE = "32 to 2048"

VALUES: dict[str, list[tuple[Any, str, str]]] = {
    # Input and its type: the value, how the refusal shows it, and what is allowed.
    "prompt BYTES": [
        (b"", "empty", "something other than white space"),
        (b"   ", "   ", "something other than white space"),
        (b"\t\r\n", r"\t\r\n", "something other than white space"),
        ("\u2003\u00a0".encode(), r"\u2003\xa0", "something other than white space"),
        (b"x" * 8193, "8193 characters long", CHARACTERS),
        ("雪".encode() * 9000, "9000 characters long", CHARACTERS),
        (b"\xff\xfe", r"\xff\xfe", "UTF-8"),
        (b"caf\xc3", r"caf\xc3", "UTF-8"),
        (b"\xc0\xaf", r"\xc0\xaf", "UTF-8"),
        (b"a fox \xed\xa0\x80", r"a fox \xed\xa0\x80", "UTF-8"),
        (b"a\0b", r"a\x00b", "text without NUL"),
        (b"\0", r"\x00", "text without NUL"),
        (b"'a' " * 65, "text with 65 quoted strings", "at most 64"),
        ("「a」“b”".encode() * 33, "text with 66 quoted strings", "at most 64"),
        (b"'" + b"x" * 3000 + b"'", "text with 3001 tokens in quoted strings", "at most 2048"),
        ("“".encode() + "雪".encode() * 700 + "”".encode(), "text with 2101 tokens in quoted strings", "at most 2048"),
    ],
    "negative_prompt BYTES": [
        (b"x" * 8193, "8193 characters long", CHARACTERS),
        (b"\xff", r"\xff", "UTF-8"),
        (b"a\0", r"a\x00", "text without NUL"),
        (b'"a" ' * 65, "text with 65 quoted strings", "at most 64"),
        (b'"' + b"x" * 3000 + b'"', "text with 3001 tokens in quoted strings", "at most 2048"),
    ],
    "glyph_text BYTES": [
        (b"\xff", r"\xff", "UTF-8"),
        (b"a\0", r"a\x00", "text without NUL"),
        (b"x" * 3000, "strings with 3001 tokens in all", "at most 2048"),
    ],
    "height INT32": [(value, str(value), SIDE) for value in (0, -1, 1, 31, 2049, 10**9, SMALLEST, LARGEST)],
    "width INT32": [(value, str(value), SIDE) for value in (0, -32, 1, 31, 2049, 10**9, SMALLEST, LARGEST)],
    "num_inference_steps INT32": [(value, str(value), "1 to 200") for value in (0, -1, 201, SMALLEST, LARGEST)],
    "num_images INT32": [(value, str(value), "1 to 8") for value in (0, -1, 9, SMALLEST, LARGEST)],
    "guidance_scale FP32": [
        (-0.5, "-0.5", "0 to 20"),
        (20.5, "20.5", "0 to 20"),
        (3e38, "3e+38", "0 to 20"),
        (math.nan, "nan", "0 to 20"),
        (math.inf, "inf", "0 to 20"),
        (-math.inf, "-inf", "0 to 20"),
    ],
    "temperature FP32": [
        (0.0, "0.0", "0.01 to 2"),
        (-1.0, "-1.0", "0.01 to 2"),
        (2.5, "2.5", "0.01 to 2"),
        (1e-40, "1e-40", "0.01 to 2"),
        (math.nan, "nan", "0.01 to 2"),
        (math.inf, "inf", "0.01 to 2"),
    ],
    "top_p FP32": [
        (0.0, "0.0", "above 0, at most 1"),
        (-0.5, "-0.5", "above 0, at most 1"),
        (1.5, "1.5", "above 0, at most 1"),
        (math.nan, "nan", "above 0, at most 1"),
        (-math.inf, "-inf", "above 0, at most 1"),
    ],
    "top_k INT32": [(value, str(value), "1 and above") for value in (0, -1, SMALLEST)],
    "output_format BYTES": [
        (b"", "", "raw, png, jpeg, webp"),
        (b"PNG", "PNG", "raw, png, jpeg, webp"),
        (b"bmp", "bmp", "raw, png, jpeg, webp"),
        (b"png\0", r"png\x00", "raw, png, jpeg, webp"),
        (b"\x80", r"\x80", "UTF-8"),
        (b"png" * 10_000, "pngpng", "raw, png, jpeg, webp"),
    ],
}


def _json(name: str, datatype: str, value: Any) -> bytes:
    if not isinstance(value, bytes):
        return json_body(json_input(name, datatype, [value]))
    # Bytes that are no text stand in the JSON as they are.
    quoted = json.dumps(value.decode("latin-1"), ensure_ascii=False).encode("latin-1")
    return json_body(json_input(name, "BYTES", ["\x7fhere"])).replace(json.dumps("\x7fhere").encode(), quoted)


def value_cases() -> dict[str, Case]:
    cases = {}
    for key, values in VALUES.items():
        name, datatype = key.split()
        for value, shown, allowed in values:
            parts = f"{name} is {shown}", allowed
            senders = {
                "grpc": grpc_send(with_small(tensor(name, datatype, value))),
                "http-binary": binary_send(with_small(tensor(name, datatype, value))),
                "http-json": http_send(_json(name, datatype, value)),
            }
            for protocol, send in senders.items():
                status = "INVALID_ARGUMENT" if protocol == "grpc" else "400"
                cases[f"{name} {repr(value)[:24]} {len(repr(value))} {protocol}"] = Case(
                    send, _pattern(*parts), (status,)
                )
    return cases


def _pattern(start: str, end: str) -> str:
    return f"^(in ensemble 'glm_image', )?{re.escape(start)}.*; allowed: .*{re.escape(end)}"

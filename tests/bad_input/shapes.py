"""Requests that are invalid before their values matter: tensors, models, bodies. Triton itself refuses most."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from bad_input.wire import (
    GENERATE,
    INFER,
    Case,
    Tensor,
    binary_send,
    grpc_send,
    http_send,
    json_body,
    json_input,
    numbers,
    strings,
    tensor,
    with_small,
)

SIDE = numbers("INT32", 32)
INVALID = ("INVALID_ARGUMENT",)
BAD_REQUEST = ("400",)
BAD_JSON = ("400", "500")  # Triton 2.51 answers 500 to much that is no JSON, or of another type
DEPTH = 100_000


def _tensors() -> dict[str, tuple[Tensor, str]]:
    """One input each, over gRPC and HTTP; where they differ, the refusal names it in both."""
    return {
        "shorter than its length says": (Tensor("prompt", "BYTES", [1], struct.pack("<I", 100) + b"abc"), "prompt"),
        "longest length": (Tensor("prompt", "BYTES", [1], struct.pack("<I", 2**32 - 1) + b"a"), "prompt"),
        "half a length": (Tensor("prompt", "BYTES", [1], b"\1\0"), "prompt"),
        "no element": (Tensor("prompt", "BYTES", [1], b""), "prompt"),
        "two elements in one": (Tensor("prompt", "BYTES", [1], strings(b"a", b"b")), "prompt"),
        "bytes behind the last": (Tensor("prompt", "BYTES", [1], strings(b"a") + b"zz"), "prompt"),
        "two prompts": (tensor("prompt", "BYTES", b"a", b"b"), "prompt"),
        "no prompts": (Tensor("prompt", "BYTES", [0], b""), "prompt"),
        "prompt in a matrix": (Tensor("prompt", "BYTES", [1, 1], strings(b"a")), "prompt"),
        "prompt of numbers": (Tensor("prompt", "INT32", [1], SIDE), "prompt"),
        "scalar": (Tensor("height", "INT32", [], SIDE), "height"),
        "empty": (Tensor("height", "INT32", [0], b""), "height"),
        "matrix": (Tensor("height", "INT32", [1, 1], SIDE), "height"),
        "rank of 100": (Tensor("height", "INT32", [1] * 100, SIDE), "height"),
        "two heights": (tensor("height", "INT32", 32, 32), "height"),
        "too many bytes": (Tensor("width", "INT32", [1], SIDE * 2), "width"),
        "too few bytes": (Tensor("width", "INT32", [1], SIDE[:3]), "width"),
        "no bytes": (Tensor("width", "INT32", [1], b""), "width"),
        "wider type": (tensor("height", "INT64", 32), "height"),
        "floating type": (tensor("num_images", "FP32", 1.0), "num_images"),
        "narrower seed": (tensor("seed", "INT32", 7), "seed"),
        "type of no meaning": (Tensor("height", "INT33", [1], SIDE), "height"),
        "negative count of images": (Tensor("image", "BYTES", [-5], b""), "image"),
        "images without end": (Tensor("image", "BYTES", [2**62], b""), "image"),
        "fewer images than said": (Tensor("image", "BYTES", [2], strings(b"a")), "image"),
        "unknown": (tensor("hoight", "INT32", 32), "hoight"),
        "output as input": (tensor("images_base64", "BYTES", b"a"), "images_base64"),
        "name with a NUL": (tensor("hei\0ght", "INT32", 32), "hei"),
        "name of nothing": (tensor("", "INT32", 32), "''"),
    }


def grpc_cases() -> dict[str, Case]:
    small = with_small()
    untyped: Any = {"id": "x", "parameters": {}}
    cases = {
        f"{name} grpc": Case(grpc_send(with_small(item)), pattern, INVALID)
        for name, (item, pattern) in _tensors().items()
    }
    cases |= {
        "unspecified dimension grpc": Case(
            grpc_send(with_small(Tensor("height", "INT32", [-1], SIDE))), "height.* got .-1.", INVALID
        ),
        "input twice grpc": Case(grpc_send([*small, small[1]]), "input 'height' already exists", INVALID),
        "no inputs grpc": Case(grpc_send([], **untyped), "prompt is empty; allowed: text", INVALID),
        "no prompt grpc": Case(grpc_send(small[1:]), "prompt is empty; allowed: text", INVALID),
        "no prompt of the first stage grpc": Case(grpc_send(small[1:], "glm_ar"), "prompt is empty; allowed", INVALID),
        "unknown model grpc": Case(grpc_send(small, "glm_imagine"), "unknown model: 'glm_imagine'", ("NOT_FOUND",)),
        "no model grpc": Case(grpc_send(small, ""), "unknown model: ''", ("NOT_FOUND",)),
        "model of a path grpc": Case(grpc_send(small, "../glm_ar"), "unknown model", ("NOT_FOUND",)),
        "unknown version grpc": Case(grpc_send(small, version="9"), "version 9 is not found", ("NOT_FOUND",)),
        "version of words grpc": Case(grpc_send(small, version="new"), "version string 'new'", INVALID),
        "unknown output grpc": Case(grpc_send(small, outputs=["pictures"]), "unexpected.*'pictures'", INVALID),
        "inner tensor as output grpc": Case(grpc_send(small, outputs=["prior_grid"]), "'prior_grid'", INVALID),
        "negative timeout grpc": Case(
            grpc_send(small, parameters={"timeout": service_pb2.InferParameter(int64_param=-5)}),
            "timeout is 18446744073709551611; allowed: a whole number",
            INVALID,
        ),
        "timeout of words grpc": Case(
            grpc_send(small, parameters={"timeout": service_pb2.InferParameter(string_param="soon")}),
            "'timeout' parameter, expected int64_param",
            INVALID,
        ),
        "endless name grpc": Case(
            grpc_send(with_small(tensor("h" * 100_000, "INT32", 32))), "", ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
        ),
    }
    return cases


def binary_cases() -> dict[str, Case]:
    prompt = tensor("prompt", "BYTES", b"a fox")
    # JSON knows no shape of negative numbers, and Triton no type of another name: it says so without the input.
    unnamed = {"negative count of images": "shape", "type of no meaning": "height|datatype|data-type"}
    cases = {
        f"{name} http": Case(binary_send(with_small(item)), unnamed.get(name, pattern), BAD_JSON)
        for name, (item, pattern) in _tensors().items()
    }
    return cases | {
        "more bytes promised http": Case(binary_send([prompt], {"prompt": 700}), "input 'prompt'", BAD_REQUEST),
        "negative number of bytes http": Case(binary_send([prompt], {"prompt": -7}), "binary_data_size", BAD_JSON),
        "endless number of bytes http": Case(binary_send([prompt], {"prompt": 2**63}), "input 'prompt'", BAD_REQUEST),
        "bytes of no input http": Case(binary_send(with_small(), extra=b"x"), "additional input data", BAD_REQUEST),
    }


def _nested(depth: int) -> dict[str, bytes]:
    inputs = b'{"inputs":[{"name":"prompt","datatype":"BYTES","shape":[1],"data":'
    return {
        "open lists": b"[" * depth,
        "lists": b"[" * depth + b"]" * depth,
        "objects": b'{"a":' * depth + b"1" + b"}" * depth,
        "data": inputs + b"[" * depth + b"]" * depth + b"}]}",
        "shape": inputs.replace(b'"shape":[1]', b'"shape":' + b"[" * depth + b"]" * depth) + b'["a"]}]}',
        "parameters": b'{"parameters":{"a":' + b"[" * depth + b"]" * depth + b'},"inputs":[]}',
        "prompt": b'{"prompt":' + b"[" * depth + b"]" * depth + b"}",
    }


def json_cases() -> dict[str, Case]:
    bodies: dict[str, tuple[bytes, str]] = {
        "not JSON": (b"hello", "JSON"),
        "half of it": (json_body()[:-20], "JSON"),
        "words behind it": (json_body() + b"junk", "JSON"),
        "empty list": (b"[]", "inputs"),
        "null": (b"null", "inputs"),
        "empty object": (b"{}", "inputs"),
        "inputs of words": (b'{"inputs": "x"}', "inputs"),
        "no inputs": (b'{"inputs": []}', "prompt is empty; allowed: text"),
        "inputs of null": (b'{"inputs": [null]}', "Input must"),
        "input without a name": (b'{"inputs": [{"datatype": "INT32", "shape": [1], "data": [1]}]}', "name"),
        "input without a shape": (b'{"inputs": [{"name": "prompt", "datatype": "BYTES", "data": ["a"]}]}', "shape"),
        "input without data": (b'{"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1]}]}', "data"),
        "shape of words": (json_body(json_input("prompt", "BYTES", ["a"], ["1"])), "shape"),
        "shape of fractions": (json_body(json_input("prompt", "BYTES", ["a"], [1.5])), "shape"),
        "word for a number": (json_body(json_input("height", "INT32", ["32"])), "data"),
        "fraction for a number": (json_body(json_input("height", "INT32", [32.5])), "data"),
        "true for a number": (json_body(json_input("height", "INT32", [True])), "data"),
        "null for a number": (json_body(json_input("height", "INT32", [None])), "data"),
        "number beyond 64 bits": (json_body(json_input("height", "INT32", [10**19])), "data"),
        "seed beyond 64 bits": (json_body(json_input("seed", "INT64", [2**63])), "data"),
        "number beyond doubles": (
            json_body(json_input("top_p", "FP32", [0.5])).replace(b"0.5", b"1e999"),
            "too big",
        ),
        "number for a word": (json_body(json_input("prompt", "BYTES", [5])), "string"),
        "word for a list": (json_body(json_input("prompt", "BYTES", "a")), "data"),
        "two for one": (json_body(json_input("prompt", "BYTES", ["a", "b"])), "'prompt'"),
        "lone surrogate": (json_body(json_input("prompt", "BYTES", ["\ud800"])), "surrogate"),
        "escape of no meaning": (json_body(json_input("prompt", "BYTES", ["@"])).replace(b"@", rb"\x"), "escape"),
        "id of a number": (json_body(id=5), "id"),
        "timeout of words": (json_body(parameters={"timeout": "soon"}), "timeout"),
        "negative timeout": (json_body(parameters={"timeout": -1}), "timeout"),
        "unknown output": (json_body(outputs=[{"name": "pictures"}]), "'pictures'"),
        "output without a name": (json_body(outputs=[{}]), "name"),
    }
    cases = {f"{name} json": Case(http_send(body), pattern, BAD_JSON) for name, (body, pattern) in bodies.items()}
    cases |= {
        f"{name} nested {DEPTH} deep": Case(http_send(body, GENERATE if name == "prompt" else INFER), "", BAD_JSON)
        for name, body in _nested(DEPTH).items()
    }
    return cases


def generate_cases() -> dict[str, Case]:
    bodies: dict[str, tuple[Any, str]] = {
        "empty object": ({}, "prompt is empty; allowed: text"),
        "list": ([], "object"),
        "number for the prompt": ({"prompt": 5}, "string"),
        "null for the prompt": ({"prompt": None}, "string"),
        "two prompts": ({"prompt": ["a", "b"]}, "input 'prompt'"),
        "object for the prompt": ({"prompt": {"text": "a"}}, "string"),
        "word for the height": ({"prompt": "a", "height": "64"}, "data"),
        "fraction for the height": ({"prompt": "a", "height": 64.5}, "data"),
        "word for guidance": ({"prompt": "a", "guidance_scale": "much"}, "data"),
        "parameters of a number": ({"prompt": "a", "parameters": 5}, "parameters"),
        "parameters in parameters": ({"prompt": "a", "parameters": {"a": {"b": 1}}}, "parameter 'a'"),
        "format": ({"prompt": "a", "output_format": "gif"}, "output_format is gif; allowed: raw, png, jpeg, webp"),
        "height": ({"prompt": "a", "height": 0}, "height is 0; allowed: 32 to 2048"),
        "hours of work": (
            {"prompt": "a", "height": 2048, "width": 2048, "num_images": 8, "num_inference_steps": 200},
            "num_images x height x width x num_inference_steps is 8 x 2048 x 2048 x 200, 6711 .*; allowed: at most",
        ),
        "timeout of words": ({"prompt": "a", "timeout": "soon"}, 'timeout is "soon"; allowed: a whole number'),
        "true for the timeout": ({"prompt": "a", "timeout": True}, "timeout is true; allowed: a whole number"),
        "fraction for the timeout": ({"prompt": "a", "timeout": 1.5}, "timeout is 1.5; allowed: a whole number"),
        "negative timeout": ({"prompt": "a", "parameters": {"timeout": -5}}, "timeout is -5; allowed: a whole number"),
    }
    return {
        f"{name} generate": Case(http_send(json.dumps(body).encode(), GENERATE), pattern, BAD_JSON)
        for name, (body, pattern) in bodies.items()
    }


def http_cases() -> dict[str, Case]:
    body = json_body()
    length = "Inference-Header-Content-Length"
    model = "/v2/models/{}/infer".format
    return {
        "no body": Case(http_send(b""), "", BAD_REQUEST),
        "negative header length": Case(http_send(body, headers={length: "-5"}), "header size", BAD_REQUEST),
        "header length beyond": Case(http_send(body, headers={length: "99999"}), "header size", BAD_REQUEST),
        "header length of words": Case(http_send(body, headers={length: "abc"}), "", BAD_JSON),
        "not gzip": Case(http_send(body, headers={"Content-Encoding": "gzip"}), "", BAD_JSON),
        "unknown encoding": Case(http_send(body, headers={"Content-Encoding": "br"}), "compression", ("501",)),
        "GET": Case(http_send(None, method="GET"), "Not Allowed", ("405",)),
        "PUT": Case(http_send(body, method="PUT"), "Not Allowed", ("405",)),
        "unknown path": Case(http_send(body, "/v2/pictures"), "Not Found", ("404",)),
        "unknown model": Case(http_send(body, model("glm_imagine")), "unknown model: 'glm_imagine'", ("404",)),
        "model of a path": Case(http_send(body, model("..%2f..%2fetc")), "unknown model", ("404",)),
        "unknown version": Case(http_send(body, model("glm_image/versions/9")), "version 9 is not found", ("404",)),
        "version of words": Case(http_send(body, model("glm_image/versions/new")), "Not Found", ("404",)),
    }


STREAM, CONTROL = "/v2/models/glm_image_stream/generate_stream", "/v2/models/glm_control/generate"
LONG_ID = "x" * 1_000_000


def header_cases() -> dict[str, Case]:
    """Ids and parameters, over every way into the models."""
    small, body, asked = with_small(), {"prompt": "a fox", "height": 32, "width": 32}, {"action": "status"}
    long_id = "request.id is 1000000 bytes long; allowed: at most 256 bytes of UTF-8"
    no_text = r"request.id is .*xff; allowed: UTF-8"
    control = [tensor("request_id", "BYTES", b"a"), tensor("action", "BYTES", b"status")]
    cases = {
        "long id grpc": Case(grpc_send(small, id=LONG_ID), long_id, INVALID),
        "long id grpc glm_ar": Case(grpc_send(small, "glm_ar", id=LONG_ID), long_id, INVALID),
        "glm_dit long id grpc": Case(grpc_send(PAINTED, "glm_dit", id=LONG_ID), long_id, INVALID),
        "long id grpc glm_control": Case(grpc_send(control, "glm_control", id=LONG_ID), long_id, INVALID),
        "long id to control": Case(
            grpc_send([tensor("request_id", "BYTES", LONG_ID.encode()), control[1]], "glm_control"), long_id, INVALID
        ),
        "parameters of no text json": Case(
            http_send(json_body(parameters={"a": "@"}).replace(b"@", b"\xff")), "request parameters is", BAD_REQUEST
        ),
    }
    for shown, pattern in (
        (LONG_ID.encode(), long_id),
        (b"\xff", no_text),
        (b"\xed\xa0\x80", r"request.id is .*UTF-8"),
    ):
        bodies = {
            INFER: json_body(id="@"),
            GENERATE: json.dumps({"id": "@", **body}).encode(),
            STREAM: json.dumps({"id": "@", **body}).encode(),
            CONTROL: json.dumps({"request_id": "@", **asked}).encode(),
        }
        for path, text in bodies.items():
            send = http_send(text.replace(b'"@"', b'"' + shown + b'"'), path)
            cases[f"id {shown[:4]!r} {path.split('/')[-2:]}"] = Case(send, pattern, BAD_REQUEST)
    made_up = {
        "arrival to come": (
            {"arrived_ns": 2**63 - 1},
            "stream_options's arrived_ns is 9223372036854775807; allowed: nu",
        ),
        "steps of words": (
            {"latent_preview_every": "all"},
            "stream_options's latent_preview_every is .all.; allowed: a",
        ),
        "entry of no meaning": (
            {"follow": True},
            "stream_options's follow is true; allowed: no entries but arrived_ns",
        ),
    }
    for model, tensors in (("glm_image", small), ("glm_ar", small), ("glm_dit", PAINTED)):
        for name, (options, pattern) in made_up.items():
            sent = grpc_send(tensors, model, parameters={"stream_options": {"string_param": json.dumps(options)}})
            cases[f"{model} stream_options: {name}"] = Case(sent, pattern, INVALID)
    return cases


PAINTED = (
    tensor("prompt", "BYTES", b"a fox"),
    Tensor("prior_token_ids", "INT32", [1, 1], numbers("INT32", 0)),
    tensor("prior_grid", "INT32", 1, 1),
    tensor("num_inference_steps", "INT32", 1),
)
"""A request to ``glm_dit`` that is right."""


def stage_cases() -> dict[str, Case]:
    """What a client gives ``glm_dit`` in place of the first stage."""
    valid = {item.name: item for item in PAINTED}
    metadata: dict[str, tuple[bytes, str]] = {
        "not JSON": (b"hello", "ar_metadata is hello; allowed: a JSON object"),
        "list": (b"[]", "ar_metadata is .*; allowed: a JSON object"),
        "number": (b"5", "ar_metadata is 5; allowed: a JSON object"),
        "not UTF-8": (b"\xff", r"ar_metadata is \\xff; allowed: UTF-8"),
        "nested": (b'{"a":' * 10_000, "ar_metadata is .*; allowed: a JSON object"),
        "long": (b'{"a":' * DEPTH, "ar_metadata is 500000 characters long; allowed: at most 65536"),
        "seconds of words": (b'{"seconds": {"prefill": "abc"}}', "ar_metadata's seconds is .*; allowed: an object"),
        "seconds that are no number": (b'{"seconds": {"prefill": NaN}}', "ar_metadata's seconds"),
        "endless seconds": (b'{"seconds": {"prefill": 1e999}}', "ar_metadata's seconds"),
        "negative seconds": (b'{"seconds": {"decode": -1}}', "ar_metadata's seconds"),
        "seconds of null": (b'{"seconds": {"decode": null}}', "ar_metadata's seconds"),
        "seconds of nothing known": (b'{"seconds": {"lunch": 3600}}', "ar_metadata's seconds"),
        "seconds in a list": (b'{"seconds": [1]}', "ar_metadata's seconds"),
        "tokens of words": (b'{"tokens": {"image": "many"}}', "ar_metadata's tokens"),
        "tokens in fractions": (b'{"tokens": {"image": 1.5}}', "ar_metadata's tokens"),
        "end of words": (b'{"finished_ns": "now"}', "ar_metadata's finished_ns"),
        "end to come": (b'{"finished_ns": %d}' % (2**63 - 1), "ar_metadata's finished_ns is .*; allowed: a time"),
        "arrival to come": (b'{"arrived_ns": %d}' % (2**63 - 1), "ar_metadata's arrived_ns is .*; allowed: a time"),
        "long id": (b'{"request_id": "%s"}' % (b"x" * 257), "ar_metadata's request_id is 257 bytes long; allowed: at"),
        "id of half a pair": (rb'{"request_id": "\ud800"}', r"ar_metadata's request_id is .*ud800; allowed: UTF-8"),
        "end beyond 64 bits": (b'{"finished_ns": 1' + b"0" * 300 + b"}", "ar_metadata's finished_ns"),
        "number without end": (b'{"finished_ns": ' + b"9" * 10_000 + b"}", "ar_metadata is .*; allowed"),
    }
    tensors = {
        f"ar_metadata: {name}": (tensor("ar_metadata", "BYTES", text), pattern)
        for name, (text, pattern) in metadata.items()
    }
    tensors |= {
        "deadline before time": (tensor("deadline_ns", "INT64", -5), "deadline_ns is -5; allowed: 0"),
        "negative size": (tensor("resolved_size", "INT32", -1, 5), "resolved_size is .-1, 5.; allowed"),
        "huge grid": (tensor("prior_grid", "INT32", 2**31 - 1, 2**31 - 1), "prior_grid is .*; allowed: two sides"),
        "negative grid": (tensor("prior_grid", "INT32", -1, -1), "prior_grid is .-1, -1.; allowed"),
        "no rows": (Tensor("prior_token_ids", "INT32", [0, 1], b""), "number of rows is 0; allowed: 1 to 8"),
        "no columns": (Tensor("prior_token_ids", "INT32", [1, 0], b""), "number of columns is 0; allowed: 1"),
        "negative token": (
            Tensor("prior_token_ids", "INT32", [1, 1], numbers("INT32", -1)),
            "prior_token_ids is a tensor with -1; allowed: 0 to",
        ),
        "flat tokens": (tensor("prior_token_ids", "INT32", 0), "input 'prior_token_ids'"),
        "bad guidance": (tensor("guidance_scale", "FP32", np.nan), "guidance_scale is nan; allowed: 0 to 20"),
        "bad prompt": (tensor("prompt", "BYTES", b"\xff"), "prompt is .*; allowed: UTF-8"),
    }
    missing = {
        f"glm_dit without {name}": Case(
            grpc_send(
                [*(item for key, item in valid.items() if key != name), tensor("resolved_seed", "INT64", 1)], "glm_dit"
            ),
            f"{name} is (missing|empty); allowed",
            INVALID,
        )
        for name in ("prompt", "prior_token_ids", "prior_grid")
    }
    return missing | {
        f"glm_dit {name}": Case(grpc_send(list({**valid, item.name: item}.values()), "glm_dit"), pattern, INVALID)
        for name, (item, pattern) in tensors.items()
    }

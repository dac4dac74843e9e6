"""Requests byte by byte, as no client library would build them, and what a server answers to them."""

from __future__ import annotations

import http.client
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from glm_image.supervisor import TritonServer

ANSWER_SECONDS = 60
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
INFER, GENERATE = "/v2/models/glm_image/infer", "/v2/models/glm_image/generate"


@dataclass(frozen=True)
class Responder:
    """The name of the gRPC status or the HTTP status, the message, and the seconds until its end."""

    status: str
    message: str
    seconds: float


@dataclass(frozen=True)
class Tensor:
    """An input as it goes over the wire; ``raw`` need not go with the rest."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes


Send = Callable[[TritonServer], Responder]


@dataclass(frozen=True)
class Case:
    """A request that is to be refused, with what the refusal is to say (a regular expression)."""

    send: Send
    pattern: str
    statuses: tuple[str, ...]


def strings(*values: bytes) -> bytes:
    """The elements of a BYTES tensor."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def numbers(datatype: str, *values: float) -> bytes:
    kind = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}[datatype]
    return np.array(values, dtype=kind).tobytes()


def tensor(name: str, datatype: str, *values: Any) -> Tensor:
    """A well-formed [k] tensor of these values."""
    raw = strings(*values) if datatype == "BYTES" else numbers(datatype, *values)
    return Tensor(name, datatype, [len(values)], raw)


SMALL = {
    item.name: item
    for item in (
        tensor("prompt", "BYTES", b"a fox"),
        tensor("height", "INT32", 32),
        tensor("width", "INT32", 32),
        tensor("num_inference_steps", "INT32", 1),
        tensor("seed", "INT64", 7),
    )
}
"""A request that is right."""


def with_small(*tensors: Tensor) -> list[Tensor]:
    """``SMALL`` with some inputs replaced or added."""
    return list({**SMALL, **{item.name: item for item in tensors}}.values())


def grpc_send(
    tensors: Sequence[Tensor],
    model: str = "glm_image",
    *,
    version: str = "",
    outputs: Sequence[str] = (),
    **fields: Any,
) -> Send:
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version, **fields)
    for item in tensors:
        request.inputs.add(name=item.name, datatype=item.datatype, shape=item.shape)
        request.raw_input_contents.append(item.raw)
    for name in outputs:
        request.outputs.add(name=name)
    return partial(_grpc_answer, request)


@cache
def _channel(url: str) -> grpc.Channel:
    channel = grpc.insecure_channel(url, options=UNLIMITED)
    grpc.channel_ready_future(channel).result(ANSWER_SECONDS)
    return channel


def _grpc_answer(request: Any, server: TritonServer) -> Responder:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(_channel(server.grpc_url))
    began = time.monotonic()
    try:
        stub.ModelInfer(request, timeout=ANSWER_SECONDS)
        return Responder("OK", "", time.monotonic() - began)
    except grpc.RpcError as error:
        return Responder(error.code().name, error.details(), time.monotonic() - began)


def http_send(
    body: bytes | None, path: str = INFER, *, method: str = "POST", headers: Mapping[str, str] | None = None
) -> Send:
    def send(server: TritonServer) -> Responder:
        with closing(http.client.HTTPConnection(server.http_url, timeout=ANSWER_SECONDS)) as connection:
            began = time.monotonic()
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            text = response.read()
            seconds = time.monotonic() - began
        try:
            message = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError):
            message = text[:200].decode(errors="replace")
        return Responder(str(response.status), message, seconds)

    return send


def binary_send(tensors: Sequence[Tensor], sizes: Mapping[str, int] | None = None, extra: bytes = b"") -> Send:
    """HTTP with binary data; ``sizes`` declare other lengths than the real ones."""
    header = {
        "inputs": [
            {
                "name": item.name,
                "datatype": item.datatype,
                "shape": list(item.shape),
                "parameters": {"binary_data_size": (sizes or {}).get(item.name, len(item.raw))},
            }
            for item in tensors
        ]
    }
    text = json.dumps(header).encode()
    body = text + b"".join(item.raw for item in tensors) + extra
    return http_send(body, headers={"Inference-Header-Content-Length": str(len(text))})


def json_input(name: str, datatype: str, data: Any, shape: Any = (1,)) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


JSON_SMALL = {
    "prompt": json_input("prompt", "BYTES", ["a fox"]),
    "height": json_input("height", "INT32", [32]),
    "width": json_input("width", "INT32", [32]),
    "num_inference_steps": json_input("num_inference_steps", "INT32", [1]),
    "seed": json_input("seed", "INT64", [7]),
}


def json_body(*inputs: dict[str, Any], **fields: Any) -> bytes:
    """The valid request in JSON, with some inputs replaced or added."""
    merged = {**JSON_SMALL, **{item["name"]: item for item in inputs}}
    return json.dumps({"inputs": list(merged.values()), **fields}).encode()

"""KServe's protocol over HTTP, in front of pools: readiness, metadata and ``infer`` of their models."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm_image_client.errors import RefusedError
from glm_image_client.transport import Outputs, Tensor
from glm_image_client.transport import Request as ModelRequest
from glm_image_gateway.connections import while_connected
from glm_image_gateway.errors import shown
from glm_image_gateway.kserve.codec import (
    datatype_of,
    from_bytes,
    from_values,
    seconds_of,
    to_bytes,
    to_values,
    with_parameters,
)
from glm_image_gateway.kserve.errors import KNOWN, http_status_of
from glm_image_gateway.kserve.front import Front, Inference
from glm_image_gateway.pools.transport import MODELS, STREAM
from glm_image_gateway.services import services_of

HEADER_LENGTH: Final = "inference-header-content-length"
"""The size of the JSON before the binary tensors of a body."""

router = APIRouter(prefix="/v2", tags=["kserve"], include_in_schema=False)


def _front(request: Request) -> Front:
    front = services_of(request).front
    if front is None:
        raise RefusedError("this gateway has no pools; allowed: KServe's protocol at the server itself")
    return front


def _failed(error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, http_status_of(error))


@router.get("")
async def server() -> dict[str, Any]:
    """Returns the metadata of the server."""
    version = importlib.metadata.version("glm-image-triton")
    return {"name": "glm_image_gateway", "version": version, "extensions": ["binary_tensor_data"]}


@router.get("/health/live")
async def live() -> Response:
    """Returns that the gateway works."""
    return Response()


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Returns whether each pool has a member that is ready."""
    return Response(status_code=200 if await services_of(request).is_ready() else 400)


@router.get("/models/{model}/ready")
async def model_ready(request: Request, model: str) -> Response:
    """Returns whether a model can be called."""
    return Response(status_code=200 if model in MODELS and await services_of(request).is_ready() else 400)


@router.get("/models/{model}")
async def metadata(request: Request, model: str) -> Response:
    """Returns the metadata of a model."""
    try:
        return JSONResponse(await _front(request).transport.model_metadata(model, None))
    except KNOWN as error:
        return _failed(error)


@router.post("/models/{model}/infer")
async def infer(request: Request, model: str) -> Response:
    """Returns the outputs of a model; closing the connection cancels the request."""
    try:
        front = _front(request)
        caller = front.caller(request.headers.get("authorization"))
        if model == STREAM:
            raise RefusedError(f"{STREAM} streams, which infer does not; allowed: gRPC's streams, or glm_image")
        body = await request.body()
        header, rest = _divided(body, request.headers.get(HEADER_LENGTH))
        inference = _inference(model, header, rest)
        outputs = await while_connected(request, front.infer(inference, caller), services_of(request).metrics)
        return _response(inference, header, outputs)
    except KNOWN as error:
        return _failed(error)


def _divided(body: bytes, length: str | None) -> tuple[Mapping[str, Any], bytes]:
    """Returns the JSON of a body, and the bytes after it."""
    size = len(body) if length is None else int(length) if length.isdecimal() else -1
    if not 0 <= size <= len(body):
        raise RefusedError(f"{HEADER_LENGTH} is {shown(length)}; allowed: a number of bytes of the body")
    try:
        header = json.loads(body[:size])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise RefusedError("the body is no JSON object; allowed: KServe's inference request")
    return header, body[size:]


def _inference(model: str, header: Mapping[str, Any], rest: bytes) -> Inference:
    parameters = _object(header, "parameters")
    tensors: list[Tensor] = []
    for item in _objects(header, "inputs"):
        name, datatype, shape = (_field(item, field, kind) for field, kind in _INPUT_FIELDS)
        size = _object(item, "parameters").get("binary_data_size")
        if size is None:
            tensors.append(from_values(name, datatype, shape, item.get("data", [])))
            continue
        if type(size) is not int or not 0 <= size <= len(rest):
            raise RefusedError(f"binary_data_size of {shown(name)} is {shown(size)}; allowed: up to {len(rest)}")
        tensors.append(from_bytes(name, datatype, shape, rest[:size]))
        rest = rest[size:]
    if rest:
        raise RefusedError(f"the body has {len(rest)} bytes after its tensors; allowed: none")
    request_id = header.get("id", "")
    if not isinstance(request_id, str):
        raise RefusedError(f"id is {shown(request_id)}; allowed: a text")
    names = tuple(_field(item, "name", str) for item in _objects(header, "outputs"))
    request = ModelRequest(model, with_parameters(tensors, parameters), request_id)
    return Inference(request, seconds_of(parameters), names)


_INPUT_FIELDS: Final[Sequence[tuple[str, type]]] = (("name", str), ("datatype", str), ("shape", list))


def _response(inference: Inference, header: Mapping[str, Any], outputs: Outputs) -> Response:
    everything = bool(_object(header, "parameters").get("binary_data_output", False))
    binary = {
        item["name"]: bool(_object(item, "parameters").get("binary_data", everything))
        for item in _objects(header, "outputs")
    }
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, array in outputs.items():
        described.append({"name": name, "datatype": datatype_of(array), "shape": list(array.shape)})
        if binary.get(name, everything):
            parts.append(to_bytes(array))
            described[-1]["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            described[-1]["data"] = to_values(array)
    request = inference.request
    text = {"model_name": request.model, "model_version": "1", "outputs": described}
    if request.request_id:
        text["id"] = request.request_id
    content = json.dumps(text).encode("ascii")
    if not parts:
        return Response(content, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(content))}
    return Response(b"".join([content, *parts]), media_type="application/octet-stream", headers=headers)


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise RefusedError(f"{name} is {shown(value)}; allowed: an object")
    return value


def _objects(fields: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    values = fields.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise RefusedError(f"{name} is {shown(values)}; allowed: an array of objects")
    return values


def _field(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise RefusedError(f"{name} of a tensor is {shown(value)}; allowed: {'an array' if kind is list else 'a text'}")
    return value

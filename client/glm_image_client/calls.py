"""The requests that a client can send, independent of protocol and of asyncio: values in, tensors out.

A value that cannot be sent raises ``BadArgumentError``.
"""

from __future__ import annotations

import io
import json
import operator
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, SupportsFloat, SupportsIndex, TypeVar, cast

import numpy as np
from PIL import Image, ImageOps

from glm_image_client.errors import BadArgumentError
from glm_image_client.events import StreamEvent
from glm_image_client.options import (
    OPTIONS,
    PROMPT,
    GenerateOptions,
    PaintOptions,
    PriorOptions,
    SourceImage,
    StreamOptions,
)
from glm_image_client.result import GenerationResult, PriorTokens, json_object
from glm_image_client.transport import Outputs, Request, Tensor, object_array

if TYPE_CHECKING:
    from typing_extensions import Unpack

ENSEMBLE: Final = "glm_image"
CONTROL_SECONDS: Final = 5.0

MAX_ID_BYTES: Final = 256
"""Of a request's id."""

AR_REQUEST_FIELDS: Final = ("request_id", "arrived_ns", "finished_ns")
"""Entries of ``ar_metadata`` about the request that made the tokens; they do not hold for a later ``paint``."""

_INTEGERS: Final[Mapping[str, type[np.signedinteger[Any]]]] = {"INT32": np.int32, "INT64": np.int64}
_PNG_MODES: Final = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Request, Generic[T]):
    """A request that is ready to be sent; one without an id need not be cancelled.

    Attributes:
        read: makes the result of the model's outputs.
        timeout: seconds; None = the client's own.
    """

    read: Callable[[Outputs], T]
    timeout: float | None


def generate(prompt: str, **options: Unpack[GenerateOptions]) -> Call[GenerationResult]:
    """Returns the call of ``GlmImageClient.generate``."""
    return _call(ENSEMBLE, GenerationResult.from_outputs, prompt, GenerateOptions, {"output_format": "png", **options})


def stream(prompt: str, **options: Unpack[StreamOptions]) -> Call[StreamEvent]:
    """Returns the call of ``GlmImageClient.stream``."""
    sent = {"output_format": "png", **options}
    return _call("glm_image_stream", StreamEvent.from_outputs, prompt, StreamOptions, sent)


def prior_tokens(prompt: str, **options: Unpack[PriorOptions]) -> Call[PriorTokens]:
    """Returns the call of ``GlmImageClient.prior_tokens``."""
    return _call("glm_ar", PriorTokens.from_outputs, prompt, PriorOptions, options)


def paint(prompt: str, prior: PriorTokens, **options: Unpack[PaintOptions]) -> Call[GenerationResult]:
    """Returns the call of ``GlmImageClient.paint``."""
    # glm_dit has no input `seed`: the seed is one of the tensors that come with the tokens.
    sent = {"output_format": "png", **options, "seed": None}
    tensors = prior_inputs(prior, options.get("seed"))
    return _call("glm_dit", GenerationResult.from_outputs, prompt, PaintOptions, sent, tensors)


def control(action: str, request_id: str, timeout: float | None) -> Call[dict[str, Any]]:
    """Returns the call of ``GlmImageClient.cancel`` or ``status``, which ``action`` names."""
    _check_id(request_id)
    tensors = [
        Tensor(name, "BYTES", object_array([value.encode()]))
        for name, value in (("request_id", request_id), ("action", action))
    ]
    return Call("glm_control", tensors, "", lambda outputs: json_object(outputs["result"][0], "result"), timeout)


def _call(
    model: str,
    read: Callable[[Outputs], T],
    prompt: str,
    kind: type,
    options: Mapping[str, Any],
    tensors: Sequence[Tensor] = (),
) -> Call[T]:
    if unknown := options.keys() - kind.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}; allowed: {', '.join(kind.__annotations__)}")
    values = {name: value for name, value in options.items() if name not in {"images", "request_id", "timeout"}}
    sent = [*request_tensors({"prompt": prompt, **values}, options.get("images")), *tensors]
    request_id = options.get("request_id") or uuid.uuid4().hex
    _check_id(request_id)
    return Call(model, sent, request_id, read, options.get("timeout"))


def _check_id(request_id: str) -> None:
    """Refuses an id that the server refuses: a transport may not be able to send it."""
    try:
        is_allowed = len(request_id.encode()) <= MAX_ID_BYTES
    except UnicodeEncodeError:
        is_allowed = False
    if not is_allowed:
        raise BadArgumentError(
            f"request_id is {request_id[:80]!r}, {len(request_id)} characters long; allowed: at most {MAX_ID_BYTES} "
            "bytes of UTF-8"
        )


def request_tensors(values: Mapping[str, object], images: Sequence[SourceImage] | None = None) -> list[Tensor]:
    """Returns the inputs of a request: each value as a tensor [1], the source images as ``image`` BYTES [k].

    A value of None is not sent, so that the server's default applies.
    """
    tensors = [_value_tensor(name, value) for name, value in values.items() if value is not None]
    if images:
        tensors.append(Tensor("image", "BYTES", object_array([source_bytes(image) for image in images])))
    return tensors


def source_bytes(image: SourceImage) -> bytes:
    """Returns the bytes to send for one source image; only a PIL image is encoded (PNG, upright)."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        buffer = io.BytesIO()
        (upright if upright.mode in _PNG_MODES else upright.convert("RGB")).save(buffer, "png", compress_level=1)
        return buffer.getvalue()
    if not isinstance(image, (str, os.PathLike)):
        raise BadArgumentError(f"image is of type {type(image).__name__}; allowed: a path, bytes or a PIL image")
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise BadArgumentError(f"image {os.fspath(image)!r} cannot be read: {error.strerror}") from error


def prior_inputs(prior: PriorTokens, seed: int | None = None) -> list[Tensor]:
    """Returns the inputs of ``glm_dit`` that come from ``glm_ar``; a seed replaces that of ``prior``."""
    kept = {name: value for name, value in prior.ar_metadata.items() if name not in AR_REQUEST_FIELDS}
    return [
        _integer_tensor("prior_token_ids", "INT32", prior.prior_token_ids),
        _integer_tensor("prior_grid", "INT32", prior.prior_grid),
        _integer_tensor("resolved_size", "INT32", prior.resolved_size),
        _integer_tensor("resolved_seed", "INT64", prior.resolved_seed if seed is None else [seed]),
        Tensor("ar_metadata", "BYTES", object_array([json.dumps(kept).encode()])),
        _integer_tensor("source_token_ids", "INT32", prior.source_token_ids),
        _integer_tensor("source_grids", "INT32", prior.source_grids),
    ]


def _value_tensor(name: str, value: object) -> Tensor:
    datatype = (PROMPT if name == "prompt" else OPTIONS[name].input).datatype
    try:
        if datatype == "BYTES":
            return Tensor(name, datatype, object_array([cast("str", value).encode("utf-8")]))
        if datatype == "FP32":
            return Tensor(name, datatype, np.array([float(cast("SupportsFloat", value))], dtype=np.float32))
        # operator.index refuses 512.5, which numpy would truncate to 512.
        number = operator.index(cast("SupportsIndex", value))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        kind = {"BYTES": "text that UTF-8 can hold", "FP32": "a number"}.get(datatype, "an integer")
        raise BadArgumentError(f"{name} is {value!r}; allowed: {kind}") from error
    dtype = _INTEGERS[datatype]
    limits = np.iinfo(dtype)
    if not limits.min <= number <= limits.max:
        raise BadArgumentError(f"{name} is {number}; allowed: a signed {limits.bits}-bit integer")
    return Tensor(name, datatype, np.array([number], dtype=dtype))


def _integer_tensor(name: str, datatype: str, values: object) -> Tensor:
    try:
        given = np.asarray(values)
        array = given.astype(_INTEGERS[datatype], casting="same_kind")
    except (TypeError, OverflowError) as error:
        raise BadArgumentError(f"{name} is not an array of integers") from error
    if not np.array_equal(array, given):
        raise BadArgumentError(f"{name} holds a number outside the range of {datatype}")
    return Tensor(name, datatype, np.ascontiguousarray(array))

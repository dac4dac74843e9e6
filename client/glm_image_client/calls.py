"""The requests that a client can send, independent of protocol and of asyncio."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from glm_image_client.errors import BadArgumentError
from glm_image_client.events import StreamEvent
from glm_image_client.options import GenerateOptions, PaintOptions, PriorOptions, StreamOptions
from glm_image_client.result import GenerationResult, PriorTokens, json_object
from glm_image_client.tensors import request_tensors
from glm_image_client.transport import Tensor, object_array

if TYPE_CHECKING:
    from typing_extensions import Unpack

ENSEMBLE: Final = "glm_image"
AR_STAGE: Final = "glm_ar"
DIT_STAGE: Final = "glm_dit"
CONTROL: Final = "glm_control"
STREAM: Final = "glm_image_stream"

CONTROL_SECONDS: Final = 5.0

AR_REQUEST_FIELDS: Final = ("request_id", "arrived_ns", "finished_ns")
"""Entries of ``ar_metadata`` about the request that made the tokens; they do not hold for a later ``paint``."""

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request that is ready to be sent.

    Attributes:
        model: the model's name.
        tensors: its inputs.
        read: makes the result of the model's outputs.
        request_id: the id to cancel it by; None = it need not be cancelled.
        timeout: seconds; None = the client's own.
    """

    model: str
    tensors: Sequence[Tensor]
    read: Callable[[Mapping[str, NDArray[Any]]], T]
    request_id: str | None
    timeout: float | None


def generate(prompt: str, **options: Unpack[GenerateOptions]) -> Call[GenerationResult]:
    """Returns the call of ``GlmImageClient.generate``."""
    return _call(ENSEMBLE, GenerationResult.from_outputs, prompt, GenerateOptions, {"output_format": "png", **options})


def stream(prompt: str, **options: Unpack[StreamOptions]) -> Call[StreamEvent]:
    """Returns the call of ``GlmImageClient.stream``."""
    return _call(STREAM, StreamEvent.from_outputs, prompt, StreamOptions, {"output_format": "png", **options})


def prior_tokens(prompt: str, **options: Unpack[PriorOptions]) -> Call[PriorTokens]:
    """Returns the call of ``GlmImageClient.prior_tokens``."""
    return _call(AR_STAGE, PriorTokens.from_outputs, prompt, PriorOptions, options)


def paint(prompt: str, prior: PriorTokens, **options: Unpack[PaintOptions]) -> Call[GenerationResult]:
    """Returns the call of ``GlmImageClient.paint``."""
    # glm_dit has no input `seed`: the seed is one of the tensors that come with the tokens.
    sent = {"output_format": "png", **options, "seed": None}
    tensors = prior_inputs(prior, options.get("seed"))
    return _call(DIT_STAGE, GenerationResult.from_outputs, prompt, PaintOptions, sent, tensors)


def cancel(request_id: str, *, timeout: float | None = CONTROL_SECONDS) -> Call[dict[str, Any]]:
    """Returns the call of ``GlmImageClient.cancel``."""
    return _control(request_id, "cancel", timeout)


def status(request_id: str, *, timeout: float | None = CONTROL_SECONDS) -> Call[dict[str, Any]]:
    """Returns the call of ``GlmImageClient.status``."""
    return _control(request_id, "status", timeout)


def _call(
    model: str,
    read: Callable[[Mapping[str, NDArray[Any]]], T],
    prompt: str,
    kind: type,
    options: Mapping[str, Any],
    tensors: Sequence[Tensor] = (),
) -> Call[T]:
    if unknown := options.keys() - kind.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}; allowed: {', '.join(kind.__annotations__)}")
    values = {name: value for name, value in options.items() if name not in {"images", "request_id", "timeout"}}
    sent = [*request_tensors({"prompt": prompt, **values}, options.get("images")), *tensors]
    return Call(model, sent, read, options.get("request_id") or uuid.uuid4().hex, options.get("timeout"))


def _control(request_id: str, action: str, timeout: float | None) -> Call[dict[str, Any]]:
    tensors = [
        Tensor(name, "BYTES", object_array([value.encode()]))
        for name, value in (("request_id", request_id), ("action", action))
    ]
    return Call(CONTROL, tensors, lambda outputs: json_object(outputs["result"][0], "result"), None, timeout)


def prior_inputs(prior: PriorTokens, seed: int | None = None) -> list[Tensor]:
    """Returns the inputs of ``glm_dit`` that come from ``glm_ar``.

    Args:
        prior: the outputs of ``glm_ar``.
        seed: replaces the seed of ``prior``; None = keep it.

    Raises:
        BadArgumentError: an array holds other values than integers, or the seed is not a 64-bit integer.
    """
    kept = {name: value for name, value in prior.ar_metadata.items() if name not in AR_REQUEST_FIELDS}
    return [
        _integers("prior_token_ids", "INT32", prior.prior_token_ids),
        _integers("prior_grid", "INT32", prior.prior_grid),
        _integers("resolved_size", "INT32", prior.resolved_size),
        _integers("resolved_seed", "INT64", prior.resolved_seed if seed is None else [seed]),
        Tensor("ar_metadata", "BYTES", object_array([json.dumps(kept).encode()])),
        _integers("source_token_ids", "INT32", prior.source_token_ids),
        _integers("source_grids", "INT32", prior.source_grids),
    ]


def _integers(name: str, datatype: str, values: object) -> Tensor:
    dtype = np.int32 if datatype == "INT32" else np.int64
    try:
        given = np.asarray(values)
        array = given.astype(dtype, casting="same_kind")
    except (TypeError, OverflowError) as error:
        raise BadArgumentError(f"{name} is not an array of integers") from error
    if not np.array_equal(array, given):
        raise BadArgumentError(f"{name} holds a number outside the range of {datatype}")
    return Tensor(name, datatype, np.ascontiguousarray(array))

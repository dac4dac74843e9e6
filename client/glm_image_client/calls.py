"""The requests that a client can send, independent of protocol and of asyncio: values in, tensors out.

A value that cannot be sent raises ``BadArgumentError``.
"""

from __future__ import annotations

import json
import operator
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, SupportsFloat, SupportsIndex, TypeVar, cast

import numpy as np

from glm_image_client.errors import BadArgumentError, ServerFailure, UnknownOptionError
from glm_image_client.events import StreamEvent
from glm_image_client.options import (
    OPTIONS,
    PROMPT,
    GenerateOptions,
    PaintOptions,
    PriorOptions,
    StreamOptions,
)
from glm_image_client.result import GenerationResult, PriorTokens, json_output
from glm_image_client.sources import source_bytes, source_images
from glm_image_client.transport import Outputs, Request, Tensor, microseconds, object_array

if TYPE_CHECKING:
    from typing_extensions import Unpack

ENSEMBLE: Final = "glm_image"
CONTROL_SECONDS: Final = 5.0

MAX_ID_BYTES: Final = 256
"""Of a request's id."""

AR_REQUEST_FIELDS: Final = ("request_id", "arrived_ns", "finished_ns")
"""Entries of ``ar_metadata`` about the request that made the tokens; they do not hold for a later ``paint``."""

_INTEGERS: Final[Mapping[str, type[np.signedinteger[Any]]]] = {"INT32": np.int32, "INT64": np.int64}

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


def of_prompts(
    prompts: Sequence[str], options: GenerateOptions, seeds: Sequence[int | None] | None = None
) -> dict[str, Callable[[], Call[GenerationResult]]]:
    """Returns for the request id of each prompt the function that makes its call; ``seeds`` are one for each prompt."""
    for prompt in prompts:
        _text("prompt", prompt)
    request_id = _request_id(options.get("request_id"))
    made: dict[str, Callable[[], Call[GenerationResult]]] = {}
    for index, prompt in enumerate(prompts):
        own: GenerateOptions = {**options, "request_id": f"{request_id}-{index}"}
        if seeds is not None:
            own["seed"] = seeds[index]
        made[f"{request_id}-{index}"] = partial(generate, prompt, **own)
    return made


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


def defaults(timeout: float | None) -> Call[dict[str, Any]]:
    """Returns the call of ``GlmImageClient.defaults``."""
    call = control("defaults", "", timeout)

    def read(outputs: Outputs) -> dict[str, Any]:
        values = call.read(outputs).get("defaults")
        if not isinstance(values, dict):
            raise ServerFailure("the server's result has no defaults")
        return values

    return replace(call, read=read)


def control(action: str, request_id: str, timeout: float | None) -> Call[dict[str, Any]]:
    """Returns a call of ``glm_control``: that of ``GlmImageClient.cancel`` or ``status``, which ``action`` names."""
    microseconds(timeout)
    _check_id(request_id)
    tensors = [
        Tensor(name, "BYTES", object_array([_text(name, value)]))
        for name, value in (("request_id", request_id), ("action", action))
    ]
    return Call("glm_control", tensors, "", lambda outputs: json_output(outputs, "result"), timeout)


def _call(
    model: str,
    read: Callable[[Outputs], T],
    prompt: str,
    kind: type,
    options: Mapping[str, Any],
    tensors: Sequence[Tensor] = (),
) -> Call[T]:
    if unknown := options.keys() - kind.__annotations__.keys():
        raise UnknownOptionError(
            f"unexpected keyword argument {min(unknown)!r}; allowed: {', '.join(kind.__annotations__)}"
        )
    _text("prompt", prompt)
    given = {name: value for name, value in options.items() if value is not None}
    if "images" in given and "image" in given:
        raise BadArgumentError("image and images are both given; allowed: one of them")
    request_id = _request_id(given.pop("request_id", None))
    timeout = given.pop("timeout", None)
    microseconds(timeout)
    images = given.pop("images", given.pop("image", None))
    return Call(model, [*request_tensors({"prompt": prompt, **given}, images), *tensors], request_id, read, timeout)


def _check_id(request_id: object) -> None:
    """Refuses an id that the server refuses: a transport may not be able to send it."""
    size = len(_text("request_id", request_id))
    if size > MAX_ID_BYTES:
        raise BadArgumentError(f"request_id is {size} bytes long; allowed: at most {MAX_ID_BYTES} bytes of UTF-8")


def _request_id(given: object) -> str:
    if given is None:
        return uuid.uuid4().hex
    _check_id(given)
    if not given:
        raise BadArgumentError("request_id is ''; allowed: a text that is not empty")
    return cast("str", given)


def request_tensors(values: Mapping[str, object], images: object = None) -> list[Tensor]:
    """Returns the inputs of a request: each value as a tensor [1], ``glyph_text`` and the images as BYTES [k].

    A value of None is not sent, so that the server's default applies. ``images`` is one ``SourceImage`` or several.
    """
    tensors = [_value_tensor(name, value) for name, value in values.items() if value is not None]
    if sources := source_images(images):
        tensors.append(Tensor("image", "BYTES", object_array([source_bytes(image) for image in sources])))
    return tensors


def accidental_text(prompt: str, rendered_text: Sequence[str]) -> list[str]:
    """Returns the rendered strings of a prompt that are probably none, such as ``t like the cat`` of two apostrophes.

    ``rendered_text`` is what the server has rendered.
    """
    found = [
        match[1]
        for match in re.finditer(r"'([^']*)'", prompt)
        if prompt[: match.start()][-1:].isalnum() or prompt[match.end() :][:1].isalnum()
    ]
    return [text for text in found if text in rendered_text]


def prior_inputs(prior: PriorTokens, seed: int | None = None) -> list[Tensor]:
    """Returns the inputs of ``glm_dit`` that come from ``glm_ar``; a seed replaces that of ``prior``."""
    if not isinstance(prior, PriorTokens):
        raise BadArgumentError(f"prior is of type {type(prior).__name__}; allowed: PriorTokens")
    try:
        kept = {name: value for name, value in prior.ar_metadata.items() if name not in AR_REQUEST_FIELDS}
        ar_metadata = json.dumps(kept).encode()
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise BadArgumentError(f"ar_metadata cannot be sent: {error}; allowed: a JSON object") from error
    return [
        _integer_tensor("prior_token_ids", "INT32", prior.prior_token_ids),
        _integer_tensor("prior_grid", "INT32", prior.prior_grid),
        _integer_tensor("resolved_size", "INT32", prior.resolved_size),
        _integer_tensor("resolved_seed", "INT64", prior.resolved_seed)
        if seed is None
        else _value_tensor("seed", seed)._replace(name="resolved_seed"),
        Tensor("ar_metadata", "BYTES", object_array([ar_metadata])),
        _integer_tensor("source_token_ids", "INT32", prior.source_token_ids),
        _integer_tensor("source_grids", "INT32", prior.source_grids),
    ]


def _value_tensor(name: str, value: object) -> Tensor:
    if name == "glyph_text":
        return Tensor(name, "BYTES", object_array(_texts(name, value)))
    datatype = (PROMPT if name == "prompt" else OPTIONS[name].input).datatype
    if datatype == "BYTES":
        return Tensor(name, datatype, object_array([_text(name, value)]))
    try:
        if datatype == "FP32":
            return Tensor(name, datatype, np.array([float(cast("SupportsFloat", value))], dtype=np.float32))
        # operator.index refuses 512.5, which numpy would truncate to 512.
        number = operator.index(cast("SupportsIndex", value))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        kind = "a number" if datatype == "FP32" else "an integer"
        raise BadArgumentError(f"{name} is {value!r}; allowed: {kind}") from error
    if name == "seed":
        number = signed_seed(number)
    dtype = _INTEGERS[datatype]
    limits = np.iinfo(dtype)
    if not limits.min <= number <= limits.max:
        raise BadArgumentError(f"{name} is {number}; allowed: a signed {limits.bits}-bit integer")
    return Tensor(name, datatype, np.array([number], dtype=dtype))


def _texts(name: str, value: object) -> list[bytes]:
    if not isinstance(value, str) and isinstance(value, Iterable):
        return [_text(name, string) for string in value]
    return [_text(name, value)]


def _text(name: str, value: object) -> bytes:
    try:
        if isinstance(value, str):
            return value.encode("utf-8")
    except ValueError:
        pass
    raise BadArgumentError(f"{name} is {value!r}; allowed: text that UTF-8 can hold")


def signed_seed(seed: int) -> int:
    """Returns a seed as the signed 64-bit integer of the same bits, which gives the same image.

    Generators of random numbers take seeds up to 2^64 - 1, and some programs draw them from there.
    """
    if not -(2**63) <= seed < 2**64:
        raise BadArgumentError(f"seed is {seed}; allowed: an integer from -2^63 to 2^64 - 1")
    return seed if seed < 2**63 else seed - 2**64


def _integer_tensor(name: str, datatype: str, values: object) -> Tensor:
    try:
        given = np.asarray(values)
        array = given.astype(_INTEGERS[datatype], casting="same_kind")
    except (TypeError, ValueError, OverflowError) as error:
        raise BadArgumentError(f"{name} is not an array of integers") from error
    if not np.array_equal(array, given):
        raise BadArgumentError(f"{name} holds a number outside the range of {datatype}")
    return Tensor(name, datatype, np.ascontiguousarray(array))

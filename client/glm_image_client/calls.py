"""The requests a client can send, apart from how it sends them: the methods of both clients are made from these."""

from __future__ import annotations

import inspect
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from glm_image_client.errors import BadArgumentError
from glm_image_client.events import StreamEvent
from glm_image_client.result import GenerationResult, PriorTokens, json_object
from glm_image_client.tensors import SourceImage, request_tensors
from glm_image_client.transport import Tensor, object_array

OF_ITS_OWN_REQUEST: Final = ("request_id", "arrived_ns", "finished_ns")

OutputFormat = Literal["raw", "png", "jpeg", "webp"]

ENSEMBLE: Final = "glm_image"
FIRST_STAGE: Final = "glm_ar"
SECOND_STAGE: Final = "glm_dit"
CONTROL: Final = "glm_control"
STREAM: Final = "glm_image_stream"

CONTROL_SECONDS: Final = 5.0

T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., Any])


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, ready to be sent.

    Attributes:
        model: which model takes it.
        tensors: its inputs.
        read: makes the answer of the model's outputs.
        request_id: what it can be cancelled by; None = it need not be.
        timeout: seconds; None = the client's own.
    """

    model: str
    tensors: Sequence[Tensor]
    read: Callable[[Mapping[str, NDArray[Any]]], T]
    request_id: str | None
    timeout: float | None


def described(method: M, prepare: Callable[..., Call[Any]]) -> M:
    """Gives a client's method the name, the documentation and the arguments of the function behind it."""
    signature = inspect.signature(prepare)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    answer = str(signature.return_annotation).removeprefix("Call[").removesuffix("]")
    told = {
        "__name__": prepare.__name__,
        "__doc__": prepare.__doc__,
        "__signature__": inspect.Signature([itself, *signature.parameters.values()], return_annotation=answer),
    }
    for name, value in told.items():
        setattr(method, name, value)
    return method


def generate(
    prompt: str,
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    num_images: int | None = None,
    negative_prompt: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    images: Sequence[SourceImage] | None = None,
    output_format: OutputFormat | None = "png",
    request_id: str | None = None,
    timeout: float | None = None,
) -> Call[GenerationResult]:
    """Generates pictures. None = not sent, so that the server's default holds.

    Args:
        prompt: what to paint; quoted text is lettered.
        height: pixels.
        width: pixels.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 and below = off.
        seed: any signed 64-bit integer; image i is that of ``seed + i``.
        num_images: pictures to make.
        negative_prompt: its quoted text is the glyph condition of the unconditional branch.
        temperature: of the image tokens' sampling.
        top_p: of the image tokens' sampling.
        top_k: of the image tokens' sampling.
        images: source images for image-to-image: paths, bytes of image files, or PIL images.
        output_format: what the server sends; ``raw`` = uint8 pixels.
        request_id: what ``cancel`` and ``status`` know it by; None = one of its own.
        timeout: seconds for all attempts; the wait here, and what the server is told of it.

    Raises:
        BadArgumentError: a value cannot be sent; nothing was.
        RefusedError: the server does not take this request.
        UnreachableError: no server answers, or the connection broke.
        BusyError: the server's queue is full, or it is about to stop.
        RequestTimeout: the time ran out, or is too short for what is asked.
        RequestCancelled: somebody has cancelled it.
        ServerFailure: the server failed.
    """
    values = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "num_images": num_images,
        "negative_prompt": negative_prompt,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "output_format": output_format,
    }
    tensors = request_tensors(values, images)
    return Call(ENSEMBLE, tensors, GenerationResult.from_outputs, _id(request_id), timeout)


def stream(
    prompt: str,
    *,
    preview_steps: int | None = None,
    preview_every: int | None = None,
    output_format: OutputFormat | None = "png",
    request_id: str | None = None,
    timeout: float | None = None,
    **values: Any,
) -> Call[StreamEvent]:
    """Generates pictures as ``generate`` does, and yields a ``StreamEvent`` for whatever happens on the way.

    Leaving the iteration cancels the request. Errors are those of ``generate``, from the iteration; nothing is sent
    again.

    Args:
        prompt: as in ``generate``.
        preview_steps: of a small first picture, painted while the rest is still being written; 0 = none.
        preview_every: denoising steps between two small pictures of how it will be; 0 = none.
        output_format: as in ``generate``; over HTTP not ``raw``.
        request_id: as in ``generate``.
        timeout: seconds for all of it.
        values: the other arguments of ``generate``.
    """
    call = generate(prompt, output_format=output_format, request_id=request_id, timeout=timeout, **values)
    asked = {"preview_steps": preview_steps, "preview_every": preview_every}
    tensors = [*call.tensors, *request_tensors(asked, None)]
    return Call(STREAM, tensors, StreamEvent.from_outputs, call.request_id, timeout)


def prior_tokens(
    prompt: str,
    *,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    num_images: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    images: Sequence[SourceImage] | None = None,
    request_id: str | None = None,
    timeout: float | None = None,
) -> Call[PriorTokens]:
    """Runs the first stage alone, for ``paint``. Arguments and errors are those of ``generate``."""
    values = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "seed": seed,
        "num_images": num_images,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
    }
    return Call(FIRST_STAGE, request_tensors(values, images), PriorTokens.from_outputs, _id(request_id), timeout)


def paint(
    prompt: str,
    prior: PriorTokens,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    seed: int | None = None,
    images: Sequence[SourceImage] | None = None,
    output_format: OutputFormat | None = "png",
    request_id: str | None = None,
    timeout: float | None = None,
) -> Call[GenerationResult]:
    """Runs the second stage alone on tokens that were kept, perhaps edited. Errors are those of ``generate``.

    Args:
        prompt: only its quoted text matters here.
        prior: the tokens; one picture for each row of ``prior_token_ids``.
        num_inference_steps: as in ``generate``.
        guidance_scale: as in ``generate``.
        negative_prompt: as in ``generate``.
        seed: of the noise; None = that of ``prior``.
        images: the source images that ``prior`` was made with, if any.
        output_format: as in ``generate``.
        request_id: as in ``generate``.
        timeout: as in ``generate``.
    """
    values = {
        "prompt": prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "output_format": output_format,
    }
    tensors = request_tensors(values, images) + prior_inputs(prior, seed)
    return Call(SECOND_STAGE, tensors, GenerationResult.from_outputs, _id(request_id), timeout)


def _id(request_id: str | None) -> str:
    return request_id or uuid.uuid4().hex


def cancel(request_id: str, *, timeout: float | None = CONTROL_SECONDS) -> Call[dict[str, Any]]:
    """Cancels every request of an id that the server has taken and not yet answered.

    Returns what the server says: ``state`` is ``cancelled``, ``already_cancelled``, ``finished``, ``failed`` or
    ``unknown``, ``cancelled`` the number of requests that this has cancelled, ``requests`` where each of them was.
    Errors are those of ``generate``.

    Args:
        request_id: what the request was sent with.
        timeout: seconds.
    """
    return _control(request_id, "cancel", timeout)


def status(request_id: str, *, timeout: float | None = CONTROL_SECONDS) -> Call[dict[str, Any]]:
    """Asks where the requests of an id are.

    Returns what the server says: ``state`` is ``queued``, ``running``, ``cancelled``, ``finished``, ``failed`` or
    ``unknown``, ``requests`` has the stage of each, and how much of it is done. Errors are those of ``generate``.

    Args:
        request_id: what the request was sent with.
        timeout: seconds.
    """
    return _control(request_id, "status", timeout)


def _control(request_id: str, action: str, timeout: float | None) -> Call[dict[str, Any]]:
    tensors = [
        Tensor(name, "BYTES", object_array([value.encode()]))
        for name, value in (("request_id", request_id), ("action", action))
    ]
    return Call(CONTROL, tensors, lambda outputs: json_object(outputs["result"][0], "result"), None, timeout)


def prior_inputs(prior: PriorTokens, seed: int | None = None) -> list[Tensor]:
    """Returns the inputs of ``glm_dit`` that come from ``glm_ar``; a seed takes the place of the prior's.

    Raises:
        BadArgumentError: an array holds no integers, or the seed is none.
    """
    # Who asked for the tokens, and when, says nothing of this painting.
    kept = {name: value for name, value in prior.ar_metadata.items() if name not in OF_ITS_OWN_REQUEST}
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
        raise BadArgumentError(f"{name} is no array of integers") from error
    if not np.array_equal(array, given):
        raise BadArgumentError(f"{name} holds a number that {datatype} cannot")
    return Tensor(name, datatype, np.ascontiguousarray(array))

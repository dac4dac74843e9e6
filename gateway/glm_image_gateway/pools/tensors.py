"""What goes between the stages: the tensors of a request, those of its parts, and the outputs of all parts together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from glm_image_client.calls import prior_inputs
from glm_image_client.errors import RefusedError, ServerFailure
from glm_image_client.options import OPTIONS, ArOptions, PaintOptions
from glm_image_client.result import PriorTokens, json_output
from glm_image_client.transport import Outputs, Tensor, object_array
from glm_image_gateway.routing import Work, ar_work, dit_work

DEFAULT_SIDE: Final = 1024
DEFAULT_STEPS: Final = 50
DEFAULT_GUIDANCE: Final = 1.5
MOST: Final = 1 << 20
"""Above every allowed number, so that a request that the stages refuse has a finite prediction."""

AR_STAGES: Final = ("ar_queue", "prefill", "decode")
QUEUES: Final = ("ar_queue", "dit_queue")

_OF_AR_ALONE: Final = {*ArOptions.__annotations__, "seed"}
_DIT_READS: Final = {"prompt", "image", *PaintOptions.__annotations__} - _OF_AR_ALONE
"""Inputs of a request that ``glm_dit`` reads too."""


@dataclass(frozen=True)
class Asked:
    """A request as far as its work depends on it; values outside the allowed range are clipped."""

    pixels: int
    images: int
    steps: int
    guidance_scale: float
    sources: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Asked:
        values = {tensor.name: tensor.data.ravel() for tensor in tensors}

        def number(name: str, default: float) -> float:
            given = values.get(name)
            if given is None or not len(given) or given.dtype == object or np.isnan(given[0]):
                return default
            return float(np.clip(given[0], 0, MOST))

        return cls(
            pixels=int(number("height", DEFAULT_SIDE) * number("width", DEFAULT_SIDE)),
            images=max(1, int(number("num_images", 1))),
            steps=int(number("num_inference_steps", DEFAULT_STEPS)),
            guidance_scale=number("guidance_scale", DEFAULT_GUIDANCE),
            sources=len(values.get("image", ())),
        )

    def ar_work(self) -> Work:
        return ar_work(self.pixels, self.images)

    def dit_work(self, images: int) -> Work:
        return dit_work(self.pixels, images, self.steps, self.guidance_scale, self.sources)


def text_of(tensors: Sequence[Tensor], name: str) -> str | None:
    """Returns an input BYTES [1]; None if it is missing or not UTF-8."""
    for tensor in tensors:
        if tensor.name == name and tensor.data.size == 1:
            value = tensor.data.ravel()[0]
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return None


def number_of(tensors: Sequence[Tensor], name: str, default: int) -> int:
    """Returns an input INT32 [1]; raises ``RefusedError`` if it is none."""
    for tensor in tensors:
        if tensor.name == name:
            if tensor.data.dtype.kind != "i" or tensor.data.size != 1:
                raise RefusedError(
                    f"{name} has type {tensor.datatype} and shape {list(tensor.data.shape)}; allowed: INT32 [1]"
                )
            return int(tensor.data.ravel()[0])
    return default


def integer_tensor(name: str, value: int) -> Tensor:
    """Returns an input INT32 [1]."""
    return Tensor(name, "INT32", np.array([value], np.int32))


def json_tensor(value: Any) -> NDArray[np.object_]:
    """Returns a value as an output BYTES [1] of JSON."""
    return object_array([json.dumps(value).encode()])


def preview_prior(preview: Mapping[str, Any]) -> PriorTokens:
    """Returns the tokens of a preview, from the event that brought them.

    Raises:
        ServerFailure: the event is malformed.
    """
    try:
        rows, columns = preview["grid"]
        return PriorTokens(
            prior_token_ids=np.array([preview["tokens"]], np.int32),
            prior_grid=np.array([rows, columns], np.int32),
            source_token_ids=np.zeros(0, np.int32),
            source_grids=np.zeros((0, 2), np.int32),
            resolved_seed=np.array([preview["seed"]], np.int64),
            resolved_size=np.array([rows * 32, columns * 32], np.int32),
            deadline_ns=np.zeros(1, np.int64),
            ar_metadata={},
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ServerFailure("the server's event has no tokens of a preview") from error


def with_seed(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Returns the inputs with a seed where they have none: what is sent again must give the same images."""
    if any(tensor.name == "seed" for tensor in tensors):
        return list(tensors)
    return [*tensors, Tensor("seed", OPTIONS["seed"].input.datatype, np.array([seed], np.int64))]


def dit_inputs(tensors: Sequence[Tensor], prior: PriorTokens) -> list[Tensor]:
    """Returns the inputs of ``glm_dit`` for a request and tokens of ``glm_ar``; times of its machine are left out."""
    return [tensor for tensor in tensors if tensor.name in _DIT_READS] + prior_inputs(prior)


def parts_of(prior: PriorTokens, counts: Sequence[int]) -> list[PriorTokens]:
    """Returns tokens in parts with so many images each; image i has the seed of the first one + i, modulo 2^64."""
    parts, first = [], 0
    for count in counts:
        seed = prior.resolved_seed.astype(np.uint64) + np.uint64(first)
        parts.append(
            replace(
                prior,
                prior_token_ids=prior.prior_token_ids[first : first + count],
                resolved_seed=seed.astype(np.int64),
            )
        )
        first += count
    return parts


def merged(parts: Sequence[Outputs]) -> Outputs:
    """Returns the outputs of ``glm_dit`` for all parts of a request.

    Raises:
        ServerFailure: an output is missing or malformed.
    """
    if len(parts) == 1:
        return parts[0]
    try:
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in ("images", "images_base64")}
    except (KeyError, ValueError) as error:
        raise ServerFailure("the parts of the request have images that do not fit together") from error
    metadata = merged_metadata([json_output(part, "metadata") for part in parts])
    return {**outputs, "metadata": object_array([json.dumps(metadata).encode()])}


def merged_metadata(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the metadata of a request whose images were rendered in parts from tokens that were made together.

    The stages of the DiT have the seconds of all parts, its queue those of the part that waited longest.
    """
    whole = dict(parts[0])
    for name in ("seeds", "cached_steps"):
        whole[name] = [value for part in parts for value in part.get(name, ())]
    whole["seconds"] = {
        stage: round(_joined(stage, [cast("float", part["seconds"].get(stage, 0.0)) for part in parts]), 6)
        for stage in parts[0]["seconds"]
    }
    return whole


def _joined(stage: str, seconds: Sequence[float]) -> float:
    if stage in AR_STAGES:
        return seconds[0]
    return max(seconds) if stage in QUEUES else sum(seconds)

"""What is told about a request beside its pictures: JSON objects for people and programs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from glm_image import __version__
from glm_image.errors import InvalidInputError
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.request.parameters import ArMetadata, PaintRequest

if TYPE_CHECKING:
    from glm_image.checkpoint.checkpoint import Checkpoint  # which imports torch, before a stage has chosen its devices

STAGES = ("ar_queue", "prefill", "decode", "dit_queue", "condition", "denoise", "vae", "encode")
"""The parts of a request's time, in the order of its way."""

TOKENS = ("prompt", "source", "preview", "image")
"""The parts of a sequence of the first stage, in their order."""


def ar_metadata(context: RequestContext, tokens: Mapping[str, int]) -> ArMetadata:
    """Returns what the first stage tells the second about a request."""
    return {
        "tokens": dict(tokens),
        "seconds": dict(context.seconds),
        "request_id": context.id,
        "arrived_ns": context.arrived_ns,
        "finished_ns": time.monotonic_ns(),
    }


def read_ar_metadata(text: str) -> ArMetadata:
    """Reads what ``ar_metadata`` gave, or what a client sends in its place; "" is nothing.

    Entries of other names are left alone, for the sake of other versions.

    Raises:
        InvalidInputError: it is no JSON object, or an entry that is read has another type than the first stage gives.
    """
    if not text:
        return {}
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError.of("ar_metadata", text, "a JSON object") from error
    if not isinstance(told, dict):
        raise InvalidInputError.of("ar_metadata", text, "a JSON object")
    for name, is_allowed, allowed in (
        ("tokens", _numbers(TOKENS, _is_count), f"an object of whole numbers of at least 0 for {', '.join(TOKENS)}"),
        ("seconds", _numbers(STAGES, _is_duration), f"an object of numbers of at least 0 for {', '.join(STAGES)}"),
        ("request_id", lambda value: isinstance(value, str) and bool(value), "a text that is not empty"),
        ("arrived_ns", _is_count, "a whole number of at least 0, below 2^63"),
        ("finished_ns", _is_count, "a whole number of at least 0, below 2^63"),
    ):
        if name in told and not is_allowed(told[name]):
            raise InvalidInputError.of(f"ar_metadata's {name}", json.dumps(told[name]), allowed)
    return cast("ArMetadata", told)


def _numbers(names: Collection[str], is_allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def are_allowed(value: Any) -> bool:
        return isinstance(value, dict) and all(name in names and is_allowed(value[name]) for name in value)

    return are_allowed


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # a bool is an int too


def _is_duration(value: Any) -> bool:
    return _is_count(value) or (type(value) is float and 0 <= value < math.inf)


def queued_seconds(metadata: ArMetadata) -> float:
    """Returns how long ago the first stage finished; both stages read the machine's monotonic clock."""
    finished = metadata.get("finished_ns")
    return max(0.0, (time.monotonic_ns() - finished) / NANOSECONDS) if isinstance(finished, int) else 0.0


def request_metadata(
    checkpoint: Checkpoint, context: RequestContext, request: PaintRequest, attention_backend: str
) -> dict[str, Any]:
    """Returns the ``metadata`` output of a finished request."""
    seconds = {**request.ar_metadata.get("seconds", {}), **context.seconds}
    return {
        "version": __version__,
        "seeds": list(request.seeds),
        "width": request.requested.width,
        "height": request.requested.height,
        "generated_width": request.generated.width,
        "generated_height": request.generated.height,
        "steps": request.num_inference_steps,
        "cached_steps": list(context.cached_steps),
        "attention_backend": attention_backend,
        "tokens": request.ar_metadata.get("tokens", {"image": request.grid.tokens}),
        "seconds": {stage: round(float(seconds.get(stage, 0.0)), 6) for stage in STAGES},
        "model": {"name": checkpoint.name, "revision": checkpoint.revision},
    }

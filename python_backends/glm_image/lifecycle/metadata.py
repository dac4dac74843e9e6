"""The JSON metadata of a request: from ``glm_ar`` to ``glm_dit``, and of the finished images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, cast

from glm_image import __version__
from glm_image.errors import InvalidInputError
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.request.parameters import ArMetadata, PaintRequest
from glm_image.request.request_id import check_request_id
from glm_image.request.stages import STAGE_ORDER

MAX_CHARACTERS: Final = 64 * 1024
"""Of ``ar_metadata``: parsing it keeps the interpreter's lock. ``glm_ar`` writes some hundred."""

MAX_SECONDS: Final = 1e6
"""Of a stage, more than any takes."""

TOKENS: Final = ("prompt", "source", "preview", "image")
"""The parts of an AR sequence, in their order."""

PASSED: Final = "a time of the server's monotonic clock that has passed; leave it out for tokens made elsewhere"


def ar_metadata(context: RequestContext, tokens: Mapping[str, int], fingerprint: str | None = None) -> ArMetadata:
    """Returns the metadata that ``glm_ar`` passes to ``glm_dit``; ``fingerprint`` is that of the checkpoint."""
    made: ArMetadata = {
        "tokens": dict(tokens),
        "seconds": dict(context.seconds),
        "request_id": context.id,
        "arrived_ns": context.arrived_ns,
        "finished_ns": time.monotonic_ns(),
    }
    return made if fingerprint is None else {**made, "fingerprint": fingerprint}


def read_ar_metadata(text: str) -> ArMetadata:
    """Parses the output of ``ar_metadata``, or a client's replacement for it; "" is an empty object.

    Unknown entries are kept, so that versions of the stages may differ. A time to come would make a request that no
    cancel reaches.

    Raises:
        InvalidInputError: it is not a JSON object, or a known entry has a value that is not allowed.
    """
    if not text:
        return {}
    if len(text) > MAX_CHARACTERS:
        raise InvalidInputError.of("ar_metadata", f"{len(text)} characters long", f"at most {MAX_CHARACTERS}")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise InvalidInputError.of("ar_metadata", text, "a JSON object")
    stages = ", ".join(STAGE_ORDER)
    for name, is_allowed, allowed in (
        ("tokens", _numbers(TOKENS, _is_count), f"an object of whole numbers of at least 0 for {', '.join(TOKENS)}"),
        ("seconds", _numbers(STAGE_ORDER, _is_duration), f"an object of numbers of at least 0 for {stages}"),
        ("fingerprint", lambda value: isinstance(value, str), "a text"),
        ("request_id", lambda value: isinstance(value, str) and bool(value), "a text that is not empty"),
        ("arrived_ns", _has_passed, PASSED),
        ("finished_ns", _has_passed, PASSED),
    ):
        if name in metadata and not is_allowed(metadata[name]):
            raise InvalidInputError.of(f"ar_metadata's {name}", json.dumps(metadata[name]), allowed)
    check_request_id("ar_metadata's request_id", metadata.get("request_id", ""))
    return cast("ArMetadata", metadata)


def check_fingerprint(metadata: ArMetadata, own: str) -> None:
    """Refuses tokens of another checkpoint than that with the fingerprint ``own``; those that name none are allowed.

    Raises:
        InvalidInputError: the tokens name another fingerprint.
    """
    given = metadata.get("fingerprint", own)
    if given != own:
        allowed = f"{own}, that of this server's checkpoint; leave it out to render tokens of another checkpoint"
        raise InvalidInputError.of("ar_metadata's fingerprint", given, allowed)


def _numbers(names: Collection[str], is_allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def are_allowed(value: Any) -> bool:
        return isinstance(value, dict) and all(name in names and is_allowed(value[name]) for name in value)

    return are_allowed


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # a bool is an int too


def _has_passed(value: Any) -> bool:
    return _is_count(value) and value <= time.monotonic_ns()


def _is_duration(value: Any) -> bool:
    return type(value) in {int, float} and 0 <= value < MAX_SECONDS


def queued_seconds(metadata: ArMetadata, busy_since_ns: int = 0) -> float:
    """Returns the seconds since ``glm_ar`` finished; both stages read the machine's monotonic clock.

    At most those since ``busy_since_ns``, when the stage was last idle: by then nothing waited for it, whatever tokens
    that a client has kept, or made up, say.
    """
    now = time.monotonic_ns()
    return max(0.0, (now - max(metadata.get("finished_ns", now), busy_since_ns)) / NANOSECONDS)


def request_metadata(
    context: RequestContext, request: PaintRequest, model: Mapping[str, Any], attention_backend: str
) -> dict[str, Any]:
    """Returns the ``metadata`` output of a finished request.

    ``model`` has the checkpoint's ``name`` and ``revision``; ``attention_backend`` has its name in diffusers.
    """
    seconds = {**request.ar_metadata.get("seconds", {}), **context.seconds}
    return {
        "version": __version__,
        "seeds": list(request.seeds),
        "width": request.requested.width,
        "height": request.requested.height,
        "generated_width": request.generated.width,
        "generated_height": request.generated.height,
        "steps": request.num_inference_steps,
        "rendered_text": list(request.rendered_text),
        "cached_steps": list(context.cached_steps),
        "attention_backend": attention_backend,
        "tokens": request.ar_metadata.get("tokens", {"image": request.grid.tokens}),
        "seconds": {stage: round(float(seconds.get(stage, 0.0)), 6) for stage in STAGE_ORDER},
        "model": dict(model),
    }

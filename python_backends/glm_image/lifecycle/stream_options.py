"""The options with which ``glm_image_stream`` calls the stages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

from glm_image.errors import InvalidInputError
from glm_image.request.parameters import MAX_PREVIEW_EVERY

MAX_CHARACTERS: Final = 2000
"""Of the JSON text, several times what the options take."""
MAX_TRACE_CHARACTERS: Final = 800


@dataclass(frozen=True)
class StreamOptions:
    """What a stage publishes of a request over IPC, in addition to its progress.

    Attributes:
        arrived_ns: the ``time.monotonic_ns()`` at which the streamed request arrived; None = not a streamed request.
        previews: whether ``glm_ar`` publishes the tokens of the first image's preview as soon as they are sampled.
        latent_preview_every: denoising steps between two latent previews that ``glm_dit`` publishes; 0 = none.
        trace: the context of the streamed request's span, as ``RequestTracing`` reads it; None = not traced.
    """

    arrived_ns: int | None = None
    previews: bool = False
    latent_preview_every: int = 0
    trace: str | None = None

    PARAMETER: ClassVar[str] = "stream_options"
    """The request parameter that holds the options as JSON: Triton's parameters are strings, numbers and booleans."""

    def parameters(self) -> dict[str, str]:
        return {self.PARAMETER: json.dumps(asdict(self))}

    @classmethod
    def read(cls, value: Any) -> StreamOptions:
        """Returns the options in the request parameter's value.

        Any client may send the parameter. What it states must be possible: a time to come would make a request that no
        cancel reaches.

        Raises:
            InvalidInputError: the value is not what ``parameters`` gives.
        """
        options = _json_object(value)
        if options is None:
            raise InvalidInputError.of(cls.PARAMETER, value, "what glm_image_stream sends; leave it out")
        for name, given in options.items():
            is_allowed, allowed = _ALLOWED.get(name, _UNKNOWN)
            if not is_allowed(given):
                raise InvalidInputError.of(f"{cls.PARAMETER}'s {name}", json.dumps(given), allowed)
        return cls(**options)


def _json_object(value: Any) -> dict[str, Any] | None:
    try:
        options = json.loads(value) if len(value) <= MAX_CHARACTERS else None
    except (ValueError, TypeError, RecursionError):
        return None
    return options if isinstance(options, dict) else None


def _is_whole(value: Any, highest: int) -> bool:
    return type(value) is int and 0 <= value <= highest  # a bool is an int too


_ALLOWED: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "arrived_ns": (
        lambda value: value is None or _is_whole(value, time.monotonic_ns()),
        "null, or a time of the server's monotonic clock that has passed",
    ),
    "previews": (lambda value: type(value) is bool, "false, true"),
    "latent_preview_every": (
        lambda value: _is_whole(value, MAX_PREVIEW_EVERY),
        f"a whole number of 0 to {MAX_PREVIEW_EVERY}",
    ),
    "trace": (
        lambda value: value is None or (isinstance(value, str) and len(value) <= MAX_TRACE_CHARACTERS),
        f"null, or text of at most {MAX_TRACE_CHARACTERS} characters",
    ),
}
_UNKNOWN: Final[tuple[Callable[[Any], bool], str]] = (lambda value: False, f"no entries but {', '.join(_ALLOWED)}")

"""Errors as OpenAI's object, and their mapping from the client's errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from glm_image_client import (
    BadArgumentError,
    BusyError,
    GlmImageClientError,
    RefusedError,
    RequestCancelled,
    RequestTimeout,
    UnreachableError,
)

MAX_SHOWN: Final = 80
RESTART_SECONDS: Final = 5
"""``Retry-After`` while no server answers."""

CLIENT_CLOSED: Final = 499
"""The status of cancelled requests, as nginx has it."""

_TYPES: Final[Mapping[int, str]] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_WAIT: Final = re.compile(r"would wait about (\d+) s")
_QUEUE_FULL: Final = re.compile(r"as many as|maximum queue size|queue is full|max_queue", re.IGNORECASE)
_OUT_OF_MEMORY: Final = re.compile(r"out of memory", re.IGNORECASE)
_INPUT: Final = re.compile(r"([a-z_]+)(?:\[\d+\])?(?:'s [a-z ]+)? (?:is|are|has|cannot|holds|begins)\b")

FIELD_NAMES: Final[Mapping[str, str]] = {"num_images": "n", "request_id": "x-request-id"}
"""Fields of requests by the names of Triton's inputs, where they differ."""


class ApiError(Exception):
    """A request's error.

    Attributes:
        status: the HTTP status.
        message: one sentence.
        code: a stable name of the cause.
        param: the field that it is about.
        retry_after: seconds after which the request may succeed.
        should_retry: whether clients should repeat the request themselves; None = as the status says.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after, self.should_retry = retry_after, should_retry

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error object."""
        error = {"message": self.message, "type": _type_of(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after)))
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        return headers

    def response(self) -> Response:
        # As any text of a client, the message may hold a lone surrogate, which JSON can and UTF-8 cannot.
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, self.headers(), media_type="application/json")


def _type_of(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < CLIENT_CLOSED else "server_error")


def shown(value: object) -> str:
    """Returns a value as it is quoted in a message: printable, at most 80 characters."""
    text = (value if isinstance(value, str) else repr(value))[: MAX_SHOWN + 1]
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def not_allowed(field: str, value: object, allowed: str, code: str = "invalid_value") -> ApiError:
    """Returns the refusal of a field's value."""
    return ApiError(400, f"{field} is {shown(value)}; allowed: {allowed}", code, param=field)


def api_error(error: GlmImageClientError) -> ApiError:
    """Returns the answer to a client for an error of ``glm_image_client``."""
    message = str(error)
    match error:
        case RefusedError() | BadArgumentError():
            return ApiError(400, message, "invalid_value", param=_field_of(message))
        case RequestTimeout():
            return ApiError(504, message, "deadline_exceeded", should_retry=False)
        case RequestCancelled():
            return ApiError(499, message, "request_cancelled", should_retry=False)
        case UnreachableError():
            return ApiError(503, message, "server_unavailable", retry_after=RESTART_SECONDS)
        case BusyError():
            return _busy(message)
    return ApiError(500, message, "server_error")


def is_out_of_memory(message: str) -> bool:
    """Whether a server's message says that the request needs more memory than the server has."""
    return _OUT_OF_MEMORY.search(message) is not None


def is_queue_full(message: str) -> bool:
    """Whether a server's message says that its queue is full."""
    return _QUEUE_FULL.search(message) is not None


def _busy(message: str) -> ApiError:
    if is_out_of_memory(message):
        return ApiError(503, message, "out_of_memory", should_retry=False)
    if is_queue_full(message):
        wait = _WAIT.search(message)
        return ApiError(429, message, "queue_full", retry_after=float(wait[1]) if wait else RESTART_SECONDS)
    return ApiError(503, message, "server_unavailable", retry_after=RESTART_SECONDS)


def _field_of(message: str) -> str | None:
    found = _INPUT.match(message)
    return FIELD_NAMES.get(found[1], found[1]) if found else None

"""What a caller has to tell apart, and how the words of Triton become it."""

from __future__ import annotations

import re
from typing import Final

# Triton's HTTP front end has a number where its gRPC front end has a name.
HTTP_STATUS_NAMES: Final = {
    "400": "INVALID_ARGUMENT",
    "404": "NOT_FOUND",
    "499": "CANCELLED",
    "500": "INTERNAL",
    "501": "UNIMPLEMENTED",
    "503": "UNAVAILABLE",
    "504": "DEADLINE_EXCEEDED",
}

_REFUSED: Final = {"INVALID_ARGUMENT", "UNIMPLEMENTED"}
# What Triton says, as NOT_FOUND, when it has unloaded its models and its ports are still open.
_STOPPING: Final = re.compile(r"has no available versions$")
_PERHAPS_TOO_LATE: Final = {"UNAVAILABLE", None}  # an event has no status
_CANCELLED: Final = re.compile(r"request .* was cancelled")
_TOO_LATE: Final = re.compile(r"time-?out|time ran out|deadline", re.IGNORECASE)
_WRAPPING: Final = (
    re.compile(r"\[request id: [^\]]*\] "),
    re.compile(r"in ensemble '[^']*', "),
    re.compile(r"\[request id: [^\]]*\] "),
    re.compile(r"Failed to process the request\(s\) for model (instance )?'[^']*', message: "),
)
_STACK: Final = re.compile(r"\n+At:\n.*", re.DOTALL)


class GlmImageClientError(Exception):
    """Base of every error this package raises on purpose; its text is one sentence to show to a person."""


class BadArgumentError(GlmImageClientError, ValueError):
    """A value cannot be sent, or a picture not be saved, as asked; the server was not asked for it."""


class RefusedError(GlmImageClientError):
    """The server does not take this request: the request itself is at fault, sending it again is of no use."""


class UnreachableError(GlmImageClientError):
    """No server answers at the address, or the connection broke before an answer came."""


class ServerFailure(GlmImageClientError):  # noqa: N818 - says what it is
    """The server took the request and gave no picture; the same request may succeed later.

    Attributes:
        status: the gRPC name of the status (``UNAVAILABLE``, ``INTERNAL``, ...), the number of an HTTP status that has
            none, or None where the server gave no status.
    """

    def __init__(self, message: str, status: str | None = None) -> None:
        super().__init__(message)
        self.status = status


class BusyError(ServerFailure):
    """The server's queue is full, or it is about to stop: the same request may succeed in a while."""


class RequestCancelled(ServerFailure):
    """The request was cancelled, here or by somebody else who knows its id."""


class RequestTimeout(ServerFailure):
    """The time given to the request ran out."""


def sentence(message: str) -> str:
    """Returns the server's own sentence: without what an ensemble and the Python backend put around it."""
    for wrapping in _WRAPPING:
        if found := wrapping.match(message):
            message = message[found.end() :]
    return _STACK.sub("", message).strip()


def status_name(status: str | None) -> str | None:
    """Returns ``StatusCode.NAME`` or an HTTP status number as the bare gRPC name, where there is one."""
    if status is None:
        return None
    return HTTP_STATUS_NAMES.get(status, status.removeprefix("StatusCode."))


def answered(status: str | None, message: str | None) -> RefusedError | ServerFailure:
    """Returns the error for what a server answered.

    Args:
        status: as ``InferenceServerException.status()`` gives it: ``StatusCode.NAME``, an HTTP status number, or None.
        message: as ``InferenceServerException.message()`` gives it.
    """
    name = status_name(status)
    text = sentence(message or "") or f"the server failed with status {name} and said nothing more"
    if name == "CANCELLED" or _CANCELLED.fullmatch(text):  # over HTTP its number is that of a refusal
        return RequestCancelled(text, "CANCELLED")
    if name in _REFUSED:
        return RefusedError(text)
    if name == "DEADLINE_EXCEEDED" or (name in _PERHAPS_TOO_LATE and _TOO_LATE.search(text)):
        return RequestTimeout(text, name)
    if name == "UNAVAILABLE" or _STOPPING.search(text):
        return BusyError(text, name)
    return ServerFailure(text, name)


def timed_out(seconds: float | None) -> RequestTimeout:
    """Returns the error for a wait that this side ended."""
    given = "the time given to the request" if seconds is None else f"{seconds:g} s"
    return RequestTimeout(f"no answer came within {given}", "DEADLINE_EXCEEDED")


def unreachable(address: str, reason: object) -> UnreachableError:
    """Returns the error for a connection that could not be made or that broke."""
    return UnreachableError(f"no server answers at {address}: {reason}")

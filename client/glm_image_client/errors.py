"""The errors of the client, and their mapping from Triton's statuses and messages."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
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
# Triton's message, with status NOT_FOUND, when it has unloaded its models and its ports are still open.
_STOPPING: Final = re.compile(r"has no available versions$")
_MAYBE_TIMEOUT: Final = {"UNAVAILABLE", None}  # an event has no status
_CONTENT_REFUSED: Final = "(content_refused)"
_CANCELLED: Final = re.compile(r"request .* was cancelled")
_TIMEOUT: Final = re.compile(r"time-?out|time ran out|deadline", re.IGNORECASE)
_WRAPPING: Final = (
    re.compile(r"\[request id: [^\]]*\] "),
    re.compile(r"in ensemble '[^']*', "),
    re.compile(r"\[request id: [^\]]*\] "),
    re.compile(r"Failed to process the request\(s\) for model (instance )?'[^']*', message: "),
)
_STACK: Final = re.compile(r"\n+At:\n.*", re.DOTALL)


_UNSAFE_CATEGORIES: Final = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Control and format characters, lone surrogates, separators of lines and paragraphs."""


def printable(text: str) -> str:
    r"""Returns ``text`` as one line for a terminal, with its control characters escaped, as ``\x1b`` or ``\u202e``."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _UNSAFE_CATEGORIES
        else character
        for character in text
    )


class GlmImageClientError(Exception):
    """Base of every error this package raises on purpose; its text is one sentence for people."""


class BadArgumentError(GlmImageClientError, ValueError):
    """A value cannot be sent, or a file cannot be read or written."""


class UnknownOptionError(BadArgumentError, TypeError):
    """A keyword argument that the method does not have."""


class PromptsError(GlmImageClientError):
    """Some of a list of prompts failed; the cause is the first error.

    Attributes:
        results: for each prompt its ``GenerationResult``, or the ``GlmImageClientError`` with which it failed.
    """

    def __init__(self, results: Sequence[object]) -> None:
        failed = [index for index, result in enumerate(results) if isinstance(result, GlmImageClientError)]
        super().__init__(
            f"{len(failed)} of {len(results)} prompts failed; the first is prompt {failed[0] + 1}: {results[failed[0]]}"
        )
        self.results = list(results)


class RefusedError(GlmImageClientError):
    """The server refuses the request because of its content; sending it again fails again."""


class ContentRefusedError(RefusedError):
    """The server's content policy refuses the prompt or an image."""


class UnreachableError(GlmImageClientError):
    """No server answers at the address, or the connection broke before an answer came."""


class TooManyPingsError(UnreachableError):
    """The server closed the connection because it permits fewer pings; the transport sends none any more."""


class ServerFailure(GlmImageClientError):  # noqa: N818 - a public name
    """The server accepted the request and failed; the same request may succeed later.

    Attributes:
        status: the gRPC name of the status (``UNAVAILABLE``, ``INTERNAL``, ...), the number of an HTTP status that has
            none, or None where the server gave no status.
    """

    def __init__(self, message: str, status: str | None = None) -> None:
        super().__init__(message)
        self.status = status


class BusyError(ServerFailure):
    """The server's queue is full, or the server is stopping: the same request may succeed later."""


class RequestCancelled(ServerFailure):
    """The request was cancelled, by this client or by another one."""


class RequestTimeout(ServerFailure):
    """The request's timeout expired."""


def sentence(message: str) -> str:
    """Returns the server's own sentence, without the text that ensembles and the Python backend add around it."""
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
    """Returns the error for a server's answer.

    Args:
        status: as ``InferenceServerException.status()`` gives it: ``StatusCode.NAME``, an HTTP status number, or None.
        message: as ``InferenceServerException.message()`` gives it.
    """
    name = status_name(status)
    text = sentence(message or "") or f"the server failed with status {name} and no message"
    if name == "CANCELLED" or _CANCELLED.fullmatch(text):  # over HTTP it has the status of a refusal
        return RequestCancelled(text, "CANCELLED")
    if name in _REFUSED:
        return ContentRefusedError(text) if _CONTENT_REFUSED in text else RefusedError(text)
    if name == "DEADLINE_EXCEEDED" or (name in _MAYBE_TIMEOUT and _TIMEOUT.search(text)):
        return RequestTimeout(text, name)
    if name == "UNAVAILABLE" or _STOPPING.search(text):
        return BusyError(text, name)
    return ServerFailure(text, name)


def reason_of(error: Exception) -> str:
    """Returns why a file cannot be read or written: the system's reason, without the path."""
    return getattr(error, "strerror", None) or str(error)


def timed_out(seconds: float | None) -> RequestTimeout:
    """Returns the error for a timeout on the client's side."""
    given = "the time given to the request" if seconds is None else f"{seconds:g} s"
    return RequestTimeout(f"no answer came within {given}", "DEADLINE_EXCEEDED")


def unreachable(address: str, reason: object) -> UnreachableError:
    """Returns the error for a failed or broken connection."""
    return UnreachableError(f"no server answers at {address}: {reason}")

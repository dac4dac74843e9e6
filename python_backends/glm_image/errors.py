"""The errors that callers see; each class has the name of its Triton status and of its reason in metrics."""

from __future__ import annotations

import unicodedata

MAX_SHOWN_CHARACTERS = 80

STATUSES = ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL")
"""Names of Triton's statuses. Names rather than codes: the stub adds ``TritonError`` to ``triton_python_backend_utils``
only after it has imported the model."""


_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control characters (C0, C1), format characters (of direction, of no width), lone surrogates, and separators of
lines and paragraphs."""


def is_unsafe(character: str) -> bool:
    """Whether a character could end a line, steer a terminal or hide a part of what is shown."""
    return not character.isprintable() and unicodedata.category(character) in _UNSAFE_CATEGORIES


def printable(text: str, keep: str = "") -> str:
    r"""Returns ``text`` as one line for a log or a terminal: unsafe characters as ``\n``, ``\x9b`` or ``\u202e``.

    ``keep`` are unsafe characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if is_unsafe(character) and character not in keep
        else character
        for character in text
    )


def shown(value: object) -> str:
    """Returns ``value`` escaped and cut to 80 characters, safe to print in a message or a log line."""
    text = (value if isinstance(value, str) else repr(value))[: MAX_SHOWN_CHARACTERS + 1]  # it may be huge
    escaped = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return escaped if len(escaped) <= MAX_SHOWN_CHARACTERS else escaped[: MAX_SHOWN_CHARACTERS - 3] + "..."


class GlmImageError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        status: one of ``STATUSES``.
        reason: the error's name in metrics.
    """

    status = "INTERNAL"
    reason = "other"


class InvalidInputError(GlmImageError):
    """A request's input is not allowed."""

    status = "INVALID_ARG"
    reason = "invalid"

    @classmethod
    def of(cls, name: str, value: object, allowed: str) -> InvalidInputError:
        """Names the input, its value and what is allowed, in one sentence."""
        return cls(f"{name} is {shown(value)}; allowed: {allowed}")


class ContentRefusedError(GlmImageError):
    """The safety hook refuses a prompt or an image; the hook's reason is in the request log only.

    Args:
        checked: ``prompt`` or ``image``.
    """

    status = "INVALID_ARG"
    reason = "content"

    def __init__(self, checked: str) -> None:
        super().__init__(f"the {checked} is refused by this server's content policy (content_refused)")


class UnavailableError(GlmImageError):
    """The engine cannot take the request now; the same request may succeed later."""

    status = "UNAVAILABLE"
    reason = "stopping"


class QueueFullError(UnavailableError):
    """The queue is full."""

    reason = "queue_full"


class DeviceMemoryError(UnavailableError):
    """The device has too little free memory for the request; Triton has no RESOURCE_EXHAUSTED."""

    reason = "memory"


class SafetyCheckError(UnavailableError):
    """The safety hook gave no verdict, and the server is configured to refuse then.

    Args:
        checked: ``prompt`` or ``image``.
    """

    reason = "safety_check"

    def __init__(self, checked: str) -> None:
        super().__init__(f"the safety check of the {checked} failed; try again later (safety_check_failed)")


class SigningError(UnavailableError):
    """An image cannot be signed as configured; it is not sent without its signature."""

    reason = "signing"


class CancelledError(GlmImageError):
    """The caller or the end of the server cancelled the request."""

    status = "CANCELLED"
    reason = "cancelled"


class DeadlineExceededError(GlmImageError):
    """The request's deadline has passed, or will before its images are done."""

    status = "UNAVAILABLE"  # as Triton answers time-outs of its own queue
    reason = "deadline"


class CheckpointError(GlmImageError):
    """A checkpoint folder is missing, incomplete or not a GLM-Image checkpoint."""


class ConfigurationError(GlmImageError):
    """A parameter of ``config.pbtxt`` or a flag has a value that is not allowed."""


def status_of(error: BaseException) -> str:
    """Returns the name of the Triton status for an exception; one that was not raised on purpose is INTERNAL."""
    return error.status if isinstance(error, GlmImageError) else "INTERNAL"

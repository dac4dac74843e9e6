"""What can go wrong, in the words a caller sees; ``serving.errors`` maps each class to a Triton status."""

from __future__ import annotations

MAX_SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """Returns ``value`` escaped and cut to 80 characters, safe to print in a message or a log line."""
    text = (value if isinstance(value, str) else repr(value))[: MAX_SHOWN_CHARACTERS + 1]  # it may be huge
    escaped = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return escaped if len(escaped) <= MAX_SHOWN_CHARACTERS else escaped[: MAX_SHOWN_CHARACTERS - 3] + "..."


class GlmImageError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        reason: what a metric calls it.
    """

    reason = "other"


class InvalidInputError(GlmImageError):
    """A request asks for what is not allowed."""

    reason = "invalid"

    @classmethod
    def of(cls, name: str, value: object, allowed: str) -> InvalidInputError:
        """Names the input, its value and what is allowed, in one sentence."""
        return cls(f"{name} is {shown(value)}; allowed: {allowed}")


class UnavailableError(GlmImageError):
    """The engine cannot take the request now; the same request may succeed later."""

    reason = "stopping"


class QueueFullError(UnavailableError):
    """As many requests wait as may."""

    reason = "queue_full"


class DeviceMemoryError(UnavailableError):
    """The device is out of memory for what the request needs."""

    reason = "memory"


class CancelledError(GlmImageError):
    """The caller, or the end of the server, cancelled the request."""

    reason = "cancelled"


class DeadlineExceededError(GlmImageError):
    """The request's time ran out, or will before its picture is done."""

    reason = "deadline"


class CheckpointError(GlmImageError):
    """A checkpoint folder is missing, incomplete or not a GLM-Image checkpoint."""


class ConfigurationError(GlmImageError):
    """A parameter of ``config.pbtxt`` or a flag has a value that is not allowed."""

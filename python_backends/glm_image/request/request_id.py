"""The id of a request: what a caller may choose."""

from __future__ import annotations

from typing import Final

from glm_image.errors import MAX_SHOWN_CHARACTERS, InvalidInputError

MAX_BYTES: Final = 256
"""Each event of a stream, each line of the request log and each span repeats the id."""

ALLOWED: Final = f"at most {MAX_BYTES} bytes of UTF-8"


def check_request_id(name: str, request_id: str) -> None:
    """Refuses an id that is too long, or has characters that UTF-8 does not hold.

    ``name`` is that of the input in the error.
    """
    try:
        size = len(request_id.encode("utf-8"))
    except UnicodeEncodeError as error:  # of a lone surrogate, as JSON can spell it
        raise InvalidInputError.of(name, request_id, "UTF-8") from error
    if size > MAX_BYTES:
        raise InvalidInputError.of(name, f"{size} bytes long", ALLOWED)


def undecodable(name: str, error: UnicodeDecodeError) -> InvalidInputError:
    """Returns the refusal of bytes that are not UTF-8, escaped."""
    return InvalidInputError.of(name, repr(bytes(error.object[: MAX_SHOWN_CHARACTERS + 1]))[2:-1], "UTF-8")

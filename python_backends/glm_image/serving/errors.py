"""Exceptions as Triton's errors."""

from __future__ import annotations

import logging
import re
from typing import Any, Final

import triton_python_backend_utils as pb_utils

from glm_image.errors import STATUSES, status_of

logger = logging.getLogger(__name__)

RELAYED: Final = re.compile(rf"\[({'|'.join(STATUSES)})\] (.*)", re.DOTALL)


class StageError(Exception):
    """A stage responded to ``glm_image_stream`` with an error; the message is the stage's."""


def triton_error(error: BaseException, *, is_relayed: bool = False) -> Any:
    """Returns the ``TritonError`` for an exception; one that was not raised on purpose is INTERNAL, and logged.

    Args:
        error: the exception.
        is_relayed: whether the error goes to another model. Triton does not pass the status on, so the message begins
            with it; a ``StageError`` has such a message.
    """
    if isinstance(error, StageError):
        status, message = _of_stage(str(error))
    else:
        status, message = status_of(error), str(error)
        if status == "INTERNAL":
            logger.error("a request failed", exc_info=error)
            message = f"{type(error).__name__}: {error}"
    return pb_utils.TritonError(
        f"[{status}] {message}" if is_relayed else message, getattr(pb_utils.TritonError, status)
    )


def _of_stage(message: str) -> tuple[str, str]:
    found = RELAYED.search(message)
    if found is not None:
        return found[1], found[2]
    return "UNAVAILABLE" if "maximum queue size" in message else "INTERNAL", message  # of Triton's own queue

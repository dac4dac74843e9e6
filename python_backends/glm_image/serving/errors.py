"""Exceptions as Triton's errors."""

from __future__ import annotations

import logging
import re
from typing import Any, Final

import triton_python_backend_utils as pb_utils

from glm_image.errors import STATUSES, status_of

logger = logging.getLogger(__name__)

RELAYED: Final = re.compile(rf"\[({'|'.join(STATUSES)})\] (.*)", re.DOTALL)


def triton_error(error: BaseException, *, is_relayed: bool = False) -> Any:
    """Returns the ``TritonError`` for an exception; one that was not raised on purpose is INTERNAL, and logged.

    Args:
        error: the exception.
        is_relayed: whether the error goes to another model. Triton does not pass the status on, so the message begins
            with it.
    """
    status, message = status_of(error), str(error)
    if status == "INTERNAL":
        logger.error("a request failed", exc_info=error)
        message = f"{type(error).__name__}: {error}"
    code = getattr(pb_utils.TritonError, status)
    return pb_utils.TritonError(f"[{status}] {message}" if is_relayed else message, code)


def relayed(message: str) -> Any:
    """Returns the ``TritonError`` for the error message of another model; see ``triton_error``."""
    found = RELAYED.search(message)
    if found is not None:
        return pb_utils.TritonError(found[2], getattr(pb_utils.TritonError, found[1]))
    is_full = "maximum queue size" in message  # of Triton's own queue
    return pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE if is_full else pb_utils.TritonError.INTERNAL)

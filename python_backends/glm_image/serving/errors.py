"""What went wrong, as Triton's status codes."""

from __future__ import annotations

import logging
import re
from typing import Any

import triton_python_backend_utils as pb_utils

from glm_image.telemetry.status import CODES, status_of

logger = logging.getLogger(__name__)


RELAYED = re.compile(rf"\[({'|'.join({*CODES.values(), 'INTERNAL'})})\] (.*)", re.DOTALL)


def triton_error(error: BaseException, *, is_relayed: bool = False) -> Any:
    """Returns the ``TritonError`` for an exception; what was not raised on purpose is INTERNAL, and logged.

    Args:
        error: the exception.
        is_relayed: whether it goes to another model, which Triton tells of no code: the words begin with it.
    """
    status, words = status_of(error), str(error)
    if status == "INTERNAL":
        logger.error("a request failed", exc_info=error)
        words = f"{type(error).__name__}: {error}"
    return pb_utils.TritonError(f"[{status}] {words}" if is_relayed else words, getattr(pb_utils.TritonError, status))


def relayed(words: str) -> Any:
    """Returns the ``TritonError`` for the words with which another model's request ended; see ``triton_error``."""
    found = RELAYED.search(words)
    if found is not None:
        return pb_utils.TritonError(found[2], getattr(pb_utils.TritonError, found[1]))
    is_full = "maximum queue size" in words  # of Triton's own queue
    return pb_utils.TritonError(words, pb_utils.TritonError.UNAVAILABLE if is_full else pb_utils.TritonError.INTERNAL)

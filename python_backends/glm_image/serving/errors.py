"""What went wrong, as Triton's status codes."""

from __future__ import annotations

import logging
from typing import Any

import triton_python_backend_utils as pb_utils

from glm_image import errors

logger = logging.getLogger(__name__)

# By name: the stub adds TritonError to pb_utils only after it has imported the model.
CODES = {
    errors.InvalidInputError: "INVALID_ARG",
    errors.UnavailableError: "UNAVAILABLE",  # of a device's memory too: Triton has no RESOURCE_EXHAUSTED
    errors.CancelledError: "CANCELLED",
    errors.DeadlineExceededError: "UNAVAILABLE",  # as Triton answers its own queue's time-outs
}


def status_of(error: BaseException) -> str:
    """Returns the name of Triton's status for an exception; what was not raised on purpose is INTERNAL."""
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), "INTERNAL")


def triton_error(error: BaseException) -> Any:
    """Returns the ``TritonError`` for an exception; what was not raised on purpose is INTERNAL, and logged."""
    status = status_of(error)
    if status != "INTERNAL":
        return pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, status))
    logger.error("a request failed", exc_info=error)
    return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

"""The name of the status with which a request ends."""

from __future__ import annotations

from glm_image import errors

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

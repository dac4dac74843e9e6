"""The errors of the client, and those of the gateway, as KServe's protocol has them over gRPC and HTTP."""

from __future__ import annotations

from typing import Final

import grpc

from glm_image_client.errors import (
    HTTP_STATUS_NAMES,
    BadArgumentError,
    BusyError,
    GlmImageClientError,
    RefusedError,
    ServerFailure,
    UnreachableError,
)
from glm_image_gateway.errors import ApiError

HTTP_STATUSES: Final = {name: int(number) for number, name in HTTP_STATUS_NAMES.items()}
API_STATUS_NAMES: Final = {number: name for name, number in HTTP_STATUSES.items()} | {
    401: "UNAUTHENTICATED",
    429: "UNAVAILABLE",
    409: "ALREADY_EXISTS",
}


def status_of(error: Exception) -> str:
    """Returns gRPC's name of the status of an error."""
    if isinstance(error, ApiError):
        return API_STATUS_NAMES.get(error.status, "INTERNAL")
    if isinstance(error, (RefusedError, BadArgumentError)):
        return "INVALID_ARGUMENT"
    if isinstance(error, (BusyError, UnreachableError)):
        return "UNAVAILABLE"
    status = error.status if isinstance(error, ServerFailure) else None
    return status if status is not None and status in grpc.StatusCode.__members__ else "INTERNAL"


def http_status_of(error: Exception) -> int:
    """Returns the HTTP status of an error."""
    return error.status if isinstance(error, ApiError) else HTTP_STATUSES.get(status_of(error), 500)


KNOWN: Final = (GlmImageClientError, ApiError)
"""Errors whose message a caller may see."""

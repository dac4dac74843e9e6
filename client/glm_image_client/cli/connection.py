"""The client of a command: connected, waited for, and with errors that say what answers at the address."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from glm_image_client.cli.diagnosis import Fault, diagnose
from glm_image_client.cli.flags import Connection
from glm_image_client.client import GlmImageClient
from glm_image_client.errors import GlmImageClientError, RefusedError, ServerFailure, UnreachableError
from glm_image_client.transport import Endpoint

POLL_SECONDS: Final = 0.5
"""Between two questions whether a server is ready: a remote server has no event for it."""


@contextmanager
def connected(connection: Connection, timeout: float | None = None) -> Iterator[GlmImageClient]:
    """Yields a client; with ``--wait`` the server is ready.

    Raises:
        UnreachableError: no GLM-Image server answers; the message says what does, and what helps.
    """
    with GlmImageClient(connection.url, connection.protocol.value, timeout=timeout) as client:
        if connection.wait is not None:
            _wait_ready(client, connection.wait)
        try:
            yield client
        except (RefusedError, UnreachableError, ServerFailure) as error:
            fault = diagnose(client.endpoint) if _may_be_no_server(error) else None
            if fault is None:
                raise
            raise UnreachableError(fault.message) from error


def _may_be_no_server(error: GlmImageClientError) -> bool:
    """Whether an error may come from something else than a GLM-Image server."""
    if isinstance(error, ServerFailure):
        status = error.status or ""
        return status == "NOT_FOUND" or status.isdigit() or "not in KServe's protocol" in str(error)
    return isinstance(error, UnreachableError) or "unknown model" in str(error)


def _wait_ready(client: GlmImageClient, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not client.server_ready():
        fault = diagnose(client.endpoint)
        if fault is not None and not fault.may_pass:
            raise UnreachableError(fault.message)
        if time.monotonic() >= deadline:
            raise UnreachableError(_late(fault, client.endpoint, seconds))
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def _late(fault: Fault | None, endpoint: Endpoint, seconds: float) -> str:
    reason = f"the server at {endpoint.address} is not ready" if fault is None else fault.message
    return f"{reason} (waited {seconds:g} s)"

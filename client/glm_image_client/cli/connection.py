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

POLL_SECONDS: Final = 0.5
"""Between two questions whether a server is ready: a remote server has no event for it."""

_NOT_READY: Final = "the server at {} is not ready: it is loading its models, or stopping; wait for it with --wait"


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
            if not _may_be_no_server(error):
                raise
            fault = diagnose(client.endpoint)
            if fault is None and client.server_ready():
                raise
            raise UnreachableError(_reason(client, fault)) from error


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
            raise UnreachableError(f"{_reason(client, fault)} (waited {seconds:g} s)")
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def _reason(client: GlmImageClient, fault: Fault | None) -> str:
    return _NOT_READY.format(client.endpoint.address) if fault is None else fault.message

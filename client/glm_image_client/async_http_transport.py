"""The transport over HTTP for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from http import HTTPStatus
from typing import Any

import tritonclient.http.aio as triton
from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    ServerDisconnectedError,
)
from numpy.typing import NDArray

from glm_image_client import server_sent
from glm_image_client.http_transport import TIMEOUTS, HttpBase
from glm_image_client.transport import Tensor

LONGEST_EVENT = 128 * 1024 * 1024
"""Bytes of an event, which is one line with all images of a request."""


class AsyncHttpTransport(HttpBase):
    """A stopping server waits for connections that are kept open and closes them at the end, so none is kept."""

    faults = (*TIMEOUTS, OSError, ClientError)

    async def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ``Transport``; over Server-Sent Events."""
        body = server_sent.body_of(inputs, request_id, timeout)
        url = f"{'https' if self._tls else 'http'}://{self._address}{server_sent.path_of(model)}"
        async with (
            self._translated_errors(timeout),
            ClientSession(timeout=ClientTimeout(total=timeout), read_bufsize=LONGEST_EVENT) as session,
            session.post(url, data=body) as answer,
        ):
            if answer.status != HTTPStatus.OK:
                raise server_sent.failure_of(answer.status, await answer.read())
            async for line in answer.content:
                if (outputs := server_sent.outputs_of_line(line)) is not None:
                    yield outputs

    async def _within(self, call: Callable[[Any], Any], timeout: float | None) -> Any:
        # tritonclient's own timeout is fixed for all calls of a client, so the time is limited here.
        async with triton.InferenceServerClient(self._address, conn_timeout=None, ssl=self._tls) as client:
            return await asyncio.wait_for(call(client), timeout)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, ClientConnectorError):
            # asyncio's message contains the address; the number gives the bare reason.
            return os.strerror(error.os_error.errno) if error.os_error.errno else str(error.os_error)
        if isinstance(error, ServerDisconnectedError):
            return "the connection was closed"
        if isinstance(error, ClientResponseError):
            return "the server at this address does not speak HTTP"
        return str(error)

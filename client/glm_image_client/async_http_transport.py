"""The HTTP half of ``transport`` for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

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
from tritonclient.utils import InferenceServerException

from glm_image_client import server_sent
from glm_image_client.errors import timed_out, unreachable
from glm_image_client.http_transport import infer_arguments, not_kserve, outputs_of, told
from glm_image_client.transport import LIVENESS_SECONDS, Endpoint, Tensor, with_integer_shapes

T = TypeVar("T")

LONGEST_EVENT = 128 * 1024 * 1024
"""Bytes of an event, a line: all the pictures of a request are one."""


class AsyncHttpTransport:
    """A connection a call: a server that stops waits for connections that are kept, and drops them when it must."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._tls = endpoint.tls

    async def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``Transport.infer``."""
        arguments = infer_arguments(inputs, request_id, timeout)

        async def call(client: Any) -> dict[str, NDArray[Any]]:
            return outputs_of(await client.infer(model, **arguments))

        return await self._told(call, timeout)

    async def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ``Transport.stream``; over Server-Sent Events."""
        body = server_sent.body_of(inputs, request_id, timeout)
        url = f"{'https' if self._tls else 'http'}://{self._address}{server_sent.path_of(model)}"
        limit = ClientTimeout(total=timeout)
        try:
            async with (
                ClientSession(timeout=limit, read_bufsize=LONGEST_EVENT) as session,
                session.post(url, data=body) as answer,
            ):
                if answer.status != HTTPStatus.OK:
                    raise server_sent.failure_of(answer.status, await answer.read())
                async for line in answer.content:
                    if (outputs := server_sent.outputs_of_line(line)) is not None:
                        yield outputs
        except asyncio.TimeoutError as error:
            raise timed_out(timeout) from error
        except (OSError, ClientError) as error:
            raise unreachable(self._address, _reason(error)) from error

    async def ready(self, timeout: float | None) -> bool:
        """See ``Transport.ready``."""
        try:
            return bool(await self._within(lambda client: client.is_server_ready(), timeout))
        except (asyncio.TimeoutError, OSError, ClientError, InferenceServerException):
            return False

    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """See ``Transport.model_metadata``."""

        async def call(client: Any) -> dict[str, Any]:
            return with_integer_shapes(await client.get_model_metadata(model))

        return await self._told(call, timeout)

    async def close(self) -> None:
        """See ``Transport.close``: no connection outlives its call."""

    async def _within(self, call: Callable[[Any], Awaitable[T]], timeout: float | None) -> T:
        # The time is kept here: tritonclient's own limit would hold for every call alike.
        async with triton.InferenceServerClient(self._address, conn_timeout=None, ssl=self._tls) as client:
            return await asyncio.wait_for(call(client), timeout)

    async def _told(self, call: Callable[[Any], Awaitable[T]], timeout: float | None) -> T:
        try:
            return await self._within(call, timeout)
        except InferenceServerException as error:
            raise told(error, self._address) from error
        except asyncio.TimeoutError as error:
            # A host that swallows packets and a slow answer both end in a timeout.
            live = await self._live()
            raise (timed_out(timeout) if live else unreachable(self._address, "the connection timed out")) from error
        except (OSError, ClientError) as error:
            raise unreachable(self._address, _reason(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise not_kserve(self._address) from error

    async def _live(self) -> bool:
        try:
            await self._within(lambda client: client.is_server_live(), LIVENESS_SECONDS)
        except InferenceServerException:
            return True
        except (asyncio.TimeoutError, OSError, ClientError):
            return False
        return True


def _reason(error: OSError | ClientError) -> str:
    if isinstance(error, ClientConnectorError):
        # asyncio writes the address into the words; the number says only what went wrong.
        return os.strerror(error.os_error.errno) if error.os_error.errno else str(error.os_error)
    if isinstance(error, ServerDisconnectedError):
        return "the connection was closed"
    if isinstance(error, ClientResponseError):
        return "what listens there does not speak HTTP"
    return str(error)

"""The transports over HTTP; streams are the Server-Sent Events of Triton's ``generate_stream``."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import struct
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, ClassVar, TypeVar

import aiohttp
import numpy as np
import tritonclient.http as triton
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from glm_image_client.errors import (
    BadArgumentError,
    GlmImageClientError,
    ServerFailure,
    answered,
    timed_out,
    unreachable,
)
from glm_image_client.transport import (
    LIVENESS_SECONDS,
    Outputs,
    Request,
    Transport,
    infer_arguments,
    microseconds,
    object_array,
)

T = TypeVar("T")

CONNECT_SECONDS = 10.0
LONGEST_EVENT = 128 * 1024 * 1024
"""Bytes of an event, which is one line with all images of a request."""

TIMEOUTS = (TimeoutError, asyncio.TimeoutError)  # two classes before Python 3.11
STREAM_PATH = "/v2/models/{}/generate_stream"
DATA = b"data:"
MAY_SUCCEED_LATER = re.compile(r"deadline|try again later|is stopping|maximum queue size|memory")

# tritonclient's message for an error without the JSON that KServe asks for.
_NOT_KSERVE = "an exception occurred in the client while decoding the response"


class HttpBase(Transport):
    """The calls of a transport that opens a connection for each of them."""

    faults: ClassVar[tuple[type[Exception], ...]]
    """What the HTTP library raises for a timeout or a broken connection."""

    @abstractmethod
    async def _within(self, call: Callable[[Any], Any], timeout: float | None) -> Any:
        """Returns the result of ``call`` of an ``InferenceServerClient``."""

    @abstractmethod
    def _reason(self, error: Exception) -> str:
        """Returns the reason of a broken connection, for people."""

    async def infer(self, request: Request, timeout: float | None) -> Outputs:
        arguments = infer_arguments(triton, request, timeout)
        async with self._translated_errors(timeout):
            result = await self._within(lambda client: client.infer(request.model, **arguments), timeout)
            outputs = {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}
        return outputs  # noqa: RET504 - mypy takes a context manager for one that may suppress errors

    async def ready(self, timeout: float | None) -> bool:
        try:
            return bool(await self._within(lambda client: client.is_server_ready(), timeout))
        except (InferenceServerException, *self.faults):
            return False

    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        async with self._translated_errors(timeout):
            metadata: dict[str, Any] = await self._within(lambda client: client.get_model_metadata(model), timeout)
        return metadata

    async def close(self) -> None:
        """Does nothing: no connection outlives its call."""

    @asynccontextmanager
    async def _translated_errors(self, timeout: float | None) -> AsyncIterator[None]:
        try:
            yield
        except InferenceServerException as error:
            raise client_error(error, self._address) from error
        except TIMEOUTS as error:
            raise await self._timeout_error(timeout) from error
        except self.faults as error:
            raise unreachable(self._address, self._reason(error)) from error
        except GlmImageClientError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            raise ServerFailure(f"{self._address} did not answer in KServe's protocol") from error

    async def _timeout_error(self, timeout: float | None) -> GlmImageClientError:
        # A host that drops packets and a slow answer both end in a timeout.
        try:
            await self._within(lambda client: client.is_server_live(), LIVENESS_SECONDS)
        except InferenceServerException:
            pass
        except self.faults:
            return unreachable(self._address, "the connection timed out")
        return timed_out(timeout)


class HttpTransport(HttpBase):
    """Blocks the calling thread. tritonclient's connections may not cross threads and have a fixed timeout."""

    faults = (*TIMEOUTS, OSError, HTTPException)

    async def stream(self, request: Request, timeout: float | None) -> AsyncGenerator[Outputs, None]:
        body = stream_body(request, timeout)
        host, slash, base = self._address.partition("/")
        connect = HTTPSConnection if self._tls else HTTPConnection
        async with self._translated_errors(timeout):
            with closing(connect(host, timeout=timeout)) as connection:
                connection.request("POST", f"{slash}{base}{STREAM_PATH.format(request.model)}", body)
                answer = connection.getresponse()
                if answer.status != HTTPStatus.OK:
                    raise stream_failure(answer.status, answer.read())
                while line := answer.readline():
                    if (outputs := stream_outputs(line)) is not None:
                        yield outputs

    async def _within(self, call: Callable[[Any], Any], timeout: float | None) -> Any:
        client = triton.InferenceServerClient(
            self._address,
            connection_timeout=CONNECT_SECONDS if timeout is None else min(timeout, CONNECT_SECONDS),
            network_timeout=timeout,
            ssl=self._tls,
        )
        with closing(client):
            return call(client)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        closed = "closed" in str(error).lower()
        return "the connection was closed" if closed else "the server at this address does not speak HTTP"


class AsyncHttpTransport(HttpBase):
    """A stopping server waits for connections that are kept open and closes them at the end, so none is kept."""

    faults = (*TIMEOUTS, OSError, aiohttp.ClientError)

    async def stream(self, request: Request, timeout: float | None) -> AsyncGenerator[Outputs, None]:
        body = stream_body(request, timeout)
        url = f"{'https' if self._tls else 'http'}://{self._address}{STREAM_PATH.format(request.model)}"
        limit = aiohttp.ClientTimeout(total=timeout)
        async with (
            self._translated_errors(timeout),
            aiohttp.ClientSession(timeout=limit, read_bufsize=LONGEST_EVENT) as session,
            session.post(url, data=body) as answer,
        ):
            if answer.status != HTTPStatus.OK:
                raise stream_failure(answer.status, await answer.read())
            async for line in answer.content:
                if (outputs := stream_outputs(line)) is not None:
                    yield outputs

    async def _within(self, call: Callable[[Any], Any], timeout: float | None) -> Any:
        # tritonclient's own timeout is fixed for all calls of a client, so the time is limited here.
        async with aio.InferenceServerClient(self._address, conn_timeout=None, ssl=self._tls) as client:
            return await asyncio.wait_for(call(client), timeout)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, aiohttp.ClientConnectorError):
            # asyncio's message contains the address; the number gives the bare reason.
            return os.strerror(error.os_error.errno) if error.os_error.errno else str(error.os_error)
        if isinstance(error, aiohttp.ServerDisconnectedError):
            return "the connection was closed"
        if isinstance(error, aiohttp.ClientResponseError):
            return "the server at this address does not speak HTTP"
        return str(error)


def client_error(error: InferenceServerException, address: str) -> GlmImageClientError:
    """Returns tritonclient's error as one of this package."""
    status, message = error.status(), error.message() or ""
    if message.startswith(_NOT_KSERVE):
        return ServerFailure(f"{address} answered HTTP {status}, not in KServe's protocol", status)
    return answered(status, message)


def stream_body(request: Request, timeout: float | None) -> bytes:
    """Returns the JSON of a request; refuses raw images, which Triton would send as text."""
    values: dict[str, Any] = {"id": request.request_id}
    for name, datatype, data in request.tensors:
        items = data.ravel().tolist()
        if datatype == "BYTES":
            items = [base64.b64encode(item).decode() if name == "image" else item.decode() for item in items]
        values[name] = items[0] if len(items) == 1 else items
    if values.get("output_format") == "raw":
        raise BadArgumentError("output_format is raw; allowed in a stream over HTTP: png, jpeg, webp")
    if (limit := microseconds(timeout)) is not None:
        values["timeout"] = limit
    return json.dumps(values).encode()


def stream_outputs(line: bytes) -> Outputs | None:
    """Returns the outputs in a line of a stream, or raises its error; None for a line without an event."""
    if not line.startswith(DATA):
        return None
    try:
        event = json.loads(line.removeprefix(DATA))
    except ValueError as error:
        raise ServerFailure("the server's event is not JSON") from error
    if not isinstance(event, dict):
        raise ServerFailure("the server's event is not a JSON object")
    if "error" in event:
        raise answered(None, str(event["error"]))
    outputs = {}
    for name in ("event", "images_base64", "metadata"):  # without shapes, and one element is not a list
        texts = event.get(name, [])
        outputs[name] = object_array([text.encode() for text in ([texts] if isinstance(texts, str) else texts)])
    return {**outputs, "images": np.zeros((0, 0, 0, 3), dtype=np.uint8)}


def stream_failure(status: int, body: bytes) -> GlmImageClientError:
    """Returns the error for an answer without a stream."""
    try:
        message = json.loads(body.removeprefix(DATA))["error"]
    except (ValueError, KeyError, TypeError):
        message = ""
    # Triton answers 400 for every error code.
    return answered("UNAVAILABLE" if MAY_SUCCEED_LATER.search(message) else str(status), message)

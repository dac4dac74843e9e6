"""Transports over HTTP: what both have in common, and the blocking one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from http.client import OK, HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, ClassVar, TypeVar

import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from glm_image_client import server_sent
from glm_image_client.core import finished
from glm_image_client.errors import GlmImageClientError, ServerFailure, answered, timed_out, unreachable
from glm_image_client.transport import (
    CONNECT_SECONDS,
    LIVENESS_SECONDS,
    Endpoint,
    Tensor,
    microseconds,
    to_infer_inputs,
    with_integer_shapes,
)

T = TypeVar("T")

TIMEOUTS = (TimeoutError, asyncio.TimeoutError)  # two classes before Python 3.11

# tritonclient's message for an error without the JSON that KServe asks for.
_NOT_KSERVE = "an exception occurred in the client while decoding the response"


class HttpBase(ABC):
    """The calls of a transport that opens a connection for each of them.

    Attributes:
        faults: what the HTTP library raises for a timeout or a broken connection.
    """

    faults: ClassVar[tuple[type[Exception], ...]]

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._tls = endpoint.tls

    @abstractmethod
    async def _within(self, call: Callable[[Any], Any], timeout: float | None) -> Any:
        """Returns ``call`` of an ``InferenceServerClient``, awaited if it is a coroutine."""

    @abstractmethod
    def _reason(self, error: Exception) -> str:
        """Returns the reason of a broken connection, for people."""

    async def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``Transport``."""
        arguments = infer_arguments(inputs, request_id, timeout)
        return await self._answer(lambda client: client.infer(model, **arguments), outputs_of, timeout)

    async def ready(self, timeout: float | None) -> bool:
        """See ``Transport``."""
        try:
            return bool(await self._within(lambda client: client.is_server_ready(), timeout))
        except InferenceServerException:
            return False
        except self.faults:
            return False

    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """See ``Transport``."""
        return await self._answer(lambda client: client.get_model_metadata(model), with_integer_shapes, timeout)

    async def close(self) -> None:  # noqa: B027 - no connection outlives its call
        """See ``Transport``."""

    async def _answer(self, call: Callable[[Any], Any], read: Callable[[Any], T], timeout: float | None) -> T:
        async with self._translated_errors(timeout):
            result = read(await self._within(call, timeout))
        return result  # noqa: RET504 - mypy takes a context manager for one that may suppress errors

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
        except (ValueError, KeyError, TypeError) as error:
            raise ServerFailure(f"{self._address} did not answer in KServe's protocol") from error

    async def _timeout_error(self, timeout: float | None) -> GlmImageClientError:
        # A host that drops packets and a slow answer both end in a timeout.
        try:
            await self._within(lambda client: client.is_server_live(), LIVENESS_SECONDS)
        except InferenceServerException:
            return timed_out(timeout)
        except self.faults:
            return unreachable(self._address, "the connection timed out")
        return timed_out(timeout)


class HttpTransport(HttpBase):
    """Blocks the calling thread. tritonclient's connections may not cross threads and have a fixed timeout."""

    faults = (*TIMEOUTS, OSError, HTTPException)

    async def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ``Transport``; over Server-Sent Events."""
        body = server_sent.body_of(inputs, request_id, timeout)
        host, _, base = self._address.partition("/")
        connect = HTTPSConnection if self._tls else HTTPConnection
        async with self._translated_errors(timeout):
            with closing(connect(host, timeout=timeout)) as connection:
                connection.request("POST", f"{'/' * bool(base)}{base}{server_sent.path_of(model)}", body)
                answer = connection.getresponse()
                if answer.status != OK:
                    raise server_sent.failure_of(answer.status, answer.read())
                while line := answer.readline():
                    if (outputs := server_sent.outputs_of_line(line)) is not None:
                        yield outputs

    async def _within(self, call: Callable[[Any], Any], timeout: float | None) -> Any:
        client = triton.InferenceServerClient(
            self._address,
            connection_timeout=CONNECT_SECONDS if timeout is None else min(timeout, CONNECT_SECONDS),
            network_timeout=timeout,
            ssl=self._tls,
        )
        with closing(client):
            return await finished(call(client))

    def _reason(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        closed = "closed" in str(error).lower()
        return "the connection was closed" if closed else "the server at this address does not speak HTTP"


def infer_arguments(inputs: Sequence[Tensor], request_id: str, timeout: float | None) -> dict[str, Any]:
    """Returns the arguments of tritonclient's ``infer`` except the model's name."""
    return {
        "inputs": to_infer_inputs(triton, inputs, binary_data=True),
        "request_id": request_id,
        "timeout": microseconds(timeout),
    }


def outputs_of(result: Any) -> dict[str, NDArray[Any]]:
    """Returns every output of an ``InferResult`` by its name."""
    names = [output["name"] for output in result.get_response()["outputs"]]
    return {name: result.as_numpy(name) for name in names}


def client_error(error: InferenceServerException, address: str) -> GlmImageClientError:
    """Returns tritonclient's error as one of this package."""
    status, message = error.status(), error.message() or ""
    if message.startswith(_NOT_KSERVE):
        return ServerFailure(f"{address} answered HTTP {status}, not in KServe's protocol", status)
    return answered(status, message)

"""Transports over gRPC: what both have in common, and the blocking one."""

from __future__ import annotations

import queue
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import closing, suppress
from typing import Any, TypeVar

import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from glm_image_client.core import finished
from glm_image_client.errors import GlmImageClientError, answered, status_name, timed_out, unreachable
from glm_image_client.transport import (
    LIVENESS_SECONDS,
    Endpoint,
    Tensor,
    microseconds,
    to_infer_inputs,
    with_integer_shapes,
)

T = TypeVar("T")

# gRPC's message around the fault: the attempt, the status, the address.
_AROUND_FAULT = re.compile(r"(?:.*last error: )?(?:[A-Z_]+: )?(?:ipv[46]:\S+: )?(.*?)(?:: OK)?", re.DOTALL)

WITH_STATUS = {"triton_grpc_error": "true"}
"""Headers with which Triton sends the status of an error in a stream, not only its message."""


class GrpcBase(ABC):
    """The calls over one channel, whose client either blocks or returns awaitables."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._tls = endpoint.tls

    @property
    @abstractmethod
    def _client(self) -> Any:
        """An ``InferenceServerClient``."""

    async def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``Transport``."""
        arguments = infer_arguments(inputs, request_id, timeout)
        return outputs_of(await self._answer(lambda: self._client.infer(model, **arguments), timeout))

    async def ready(self, timeout: float | None) -> bool:
        """See ``Transport``."""
        return await self._succeeds(lambda: self._client.is_server_ready(client_timeout=timeout))

    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """See ``Transport``."""

        def call() -> Any:
            return self._client.get_model_metadata(model, as_json=True, client_timeout=timeout)

        return with_integer_shapes(await self._answer(call, timeout))

    async def _answer(self, call: Callable[[], T | Awaitable[T]], timeout: float | None) -> T:
        try:
            return await finished(call())
        except InferenceServerException as error:
            raise await self._error(error, timeout) from error

    async def _error(self, error: InferenceServerException, timeout: float | None) -> GlmImageClientError:
        # gRPC reports UNAVAILABLE for a full queue and for a failed connection, and DEADLINE_EXCEEDED for a slow answer
        # and for a host that drops packets: ask the server whether it is there.
        live = status_name(error.status()) not in {"UNAVAILABLE", "DEADLINE_EXCEEDED"} or await self._succeeds(
            lambda: self._client.is_server_live(client_timeout=LIVENESS_SECONDS)
        )
        return client_error(error, self._address, timeout, live=live)

    async def _succeeds(self, call: Callable[[], Any]) -> bool:
        try:
            return bool(await finished(call()))
        except InferenceServerException:
            return False


class GrpcTransport(GrpcBase):
    """One channel to a server, shared by the calling threads, which it blocks."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self._channel = self._connected()

    @property
    def _client(self) -> Any:
        return self._channel

    async def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ``Transport``; uses a connection of its own, because tritonclient has one stream for each connection."""
        responses: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        with closing(self._connected()) as client:
            client.start_stream(
                lambda result, error: responses.put((result, error)), stream_timeout=timeout, headers=WITH_STATUS
            )
            is_last = False
            try:
                with suppress(InferenceServerException):  # the callback reports a failed connection
                    client.async_stream_infer(model, **stream_arguments(inputs, request_id, timeout))
                while not is_last:
                    result, error = responses.get()
                    if error is not None:
                        raise await self._error(error, timeout) from error
                    is_last = is_final(result)
                    if outputs := outputs_of(result):
                        yield outputs
            finally:
                # Triton 2.51 may never release a request that is cancelled just after its last response, nor its
                # model, which then cannot be unloaded.
                client.stop_stream(cancel_requests=not is_last)

    async def close(self) -> None:
        """See ``Transport``."""
        self._channel.close()

    def _connected(self) -> Any:
        return triton.InferenceServerClient(self._address, ssl=self._tls)


def infer_arguments(inputs: Sequence[Tensor], request_id: str, timeout: float | None) -> dict[str, Any]:
    """Returns the arguments of tritonclient's ``infer`` except the model's name."""
    return {
        "inputs": to_infer_inputs(triton, inputs),
        "request_id": request_id,
        "timeout": microseconds(timeout),
        "client_timeout": timeout,
    }


def stream_arguments(inputs: Sequence[Tensor], request_id: str, timeout: float | None) -> dict[str, Any]:
    """Returns the arguments of a request in a stream of tritonclient except the model's name."""
    arguments = infer_arguments(inputs, request_id, timeout)
    del arguments["client_timeout"]
    return {**arguments, "enable_empty_final_response": True}


def is_final(result: Any) -> bool:
    """Returns whether an ``InferResult`` of a stream is the last one."""
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def outputs_of(result: Any) -> dict[str, NDArray[Any]]:
    """Returns every output of an ``InferResult`` by its name."""
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def client_error(
    error: InferenceServerException, address: str, timeout: float | None, *, live: bool
) -> GlmImageClientError:
    """Returns tritonclient's error as one of this package; ``live`` = a server answers at the address."""
    status, message = status_name(error.status()), error.message() or ""
    late = status == "DEADLINE_EXCEEDED"
    if not live:
        return unreachable(address, "the connection timed out" if late else connection_fault(message))
    return timed_out(timeout) if late else answered(status, message)


def connection_fault(message: str) -> str:
    """Returns the reason of a failed connection, from gRPC's message."""
    found = _AROUND_FAULT.fullmatch(message)
    return found[1] if found else message

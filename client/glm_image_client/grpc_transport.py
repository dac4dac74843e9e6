"""The transports over gRPC: what both have in common, the blocking one, and the one for asyncio."""

from __future__ import annotations

import queue
import re
import struct
import threading
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import closing, suppress
from functools import cached_property
from inspect import isawaitable
from typing import Any, TypeVar, cast

import grpc
import tritonclient.grpc as triton
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from glm_image_client.errors import (
    GlmImageClientError,
    ServerFailure,
    TooManyPingsError,
    answered,
    status_name,
    timed_out,
    unreachable,
)
from glm_image_client.transport import (
    LIVENESS_SECONDS,
    TRACE_HEADERS,
    Endpoint,
    Outputs,
    Request,
    Transport,
    infer_arguments,
)

T = TypeVar("T")

# gRPC's message around the fault: the attempt, the status, the address.
_AROUND_FAULT = re.compile(r"(?:.*last error: )?(?:[A-Z_]+: )?(?:ipv[46]:\S+: )?(.*?)(?:: OK)?", re.DOTALL)

# gRPC's message when a server closes the connection with GOAWAY for its pings.
_TOO_MANY_PINGS = re.compile(r"too.many.pings", re.IGNORECASE)

MAX_BACKOFF_SECONDS = 2
"""The longest pause between two attempts to connect. gRPC's own, two minutes, would outlast a server's restart."""

PING_ANSWER_SECONDS = 20
"""Without an answer to a ping by then the connection counts as broken."""

WITH_STATUS = {"triton_grpc_error": "true"}
"""Headers with which Triton sends the status of an error in a stream, not only its message."""


class GrpcBase(Transport):
    """The calls over one channel. The methods of ``_client``, a client of tritonclient, block or return awaitables."""

    _client: Any

    def __init__(self, endpoint: Endpoint, keepalive: float | None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(endpoint)
        self._keepalive = keepalive
        self._headers = dict(headers or {})
        self._lock = threading.Lock()
        self._retired: list[Any] = []

    @abstractmethod
    def _connected(self) -> Any:
        """Returns a client of tritonclient."""

    def _keepalive_options(self) -> triton.KeepAliveOptions:
        if self._keepalive is None:
            return triton.KeepAliveOptions()
        return triton.KeepAliveOptions(
            keepalive_time_ms=max(1, round(self._keepalive * 1000)),
            keepalive_timeout_ms=PING_ANSWER_SECONDS * 1000,
            http2_max_pings_without_data=0,  # no limit, as a request sends nothing while it waits for its images
        )

    def _channel_options(self) -> list[tuple[str, int]]:
        pings = self._keepalive_options()
        return [
            ("grpc.max_send_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
            ("grpc.max_receive_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
            ("grpc.keepalive_time_ms", pings.keepalive_time_ms),
            ("grpc.keepalive_timeout_ms", pings.keepalive_timeout_ms),
            ("grpc.keepalive_permit_without_calls", int(pings.keepalive_permit_without_calls)),
            ("grpc.http2.max_pings_without_data", pings.http2_max_pings_without_data),
            ("grpc.max_reconnect_backoff_ms", MAX_BACKOFF_SECONDS * 1000),
        ]

    def _stop_pings(self) -> None:
        with self._lock:
            if self._keepalive is not None:
                self._keepalive = None
                self._retired.append(self._client)  # not closed yet: other calls may be reading their errors
                self._client = self._connected()

    async def infer(self, request: Request, timeout: float | None) -> Outputs:
        arguments = infer_arguments(triton, request, timeout)
        headers = {**self._headers, **TRACE_HEADERS.get()}

        def call() -> Any:
            return self._client.infer(request.model, **arguments, client_timeout=timeout, headers=headers)

        return outputs_of(await self._answer(call, timeout))

    async def ready(self, timeout: float | None) -> bool:
        return await self._succeeds(
            lambda: self._client.is_server_ready(headers=self._headers or None, client_timeout=timeout)
        )

    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        def call() -> Any:
            return self._client.get_model_metadata(
                model, as_json=True, headers=self._headers or None, client_timeout=timeout
            )

        return with_integer_shapes(await self._answer(call, timeout))

    async def _answer(self, call: Callable[[], T | Awaitable[T]], timeout: float | None) -> T:
        try:
            return await _finished(call())
        except InferenceServerException as error:
            raise await self._error(error, timeout) from error
        except grpc.RpcError as error:  # tritonclient's stream for asyncio does not convert it
            fault = InferenceServerException(error.details() or "", str(error.code()))
            raise await self._error(fault, timeout) from error

    async def _error(self, error: InferenceServerException, timeout: float | None) -> GlmImageClientError:
        # gRPC reports UNAVAILABLE for a full queue and for a failed connection, and DEADLINE_EXCEEDED for a slow answer
        # and for a host that drops packets: ask the server whether it is there.
        if _TOO_MANY_PINGS.search(error.message() or ""):
            self._stop_pings()
            return TooManyPingsError(f"the server at {self._address} permits fewer pings than this client has sent")
        live = status_name(error.status()) not in {"UNAVAILABLE", "DEADLINE_EXCEEDED"} or await self._succeeds(
            lambda: self._client.is_server_live(headers=self._headers or None, client_timeout=LIVENESS_SECONDS)
        )
        return client_error(error, self._address, timeout, live=live)

    async def _succeeds(self, call: Callable[[], Any]) -> bool:
        try:
            return bool(await _finished(call()))
        except InferenceServerException:
            return False


class GrpcTransport(GrpcBase):
    """One channel to a server, shared by the calling threads, which it blocks."""

    def __init__(self, endpoint: Endpoint, keepalive: float | None) -> None:
        super().__init__(endpoint, keepalive)
        self._client = self._connected()

    async def stream(self, request: Request, timeout: float | None) -> AsyncGenerator[Outputs, None]:
        responses: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        arguments = infer_arguments(triton, request, timeout)
        with closing(self._connected()) as client:  # tritonclient has one stream for each connection
            client.start_stream(
                lambda result, error: responses.put((result, error)),
                stream_timeout=timeout,
                headers={**self._headers, **stream_headers()},
            )
            is_last = False
            try:
                with suppress(InferenceServerException):  # the callback reports a failed connection
                    client.async_stream_infer(request.model, **arguments, enable_empty_final_response=True)
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
        for client in (*self._retired, self._client):
            client.close()

    def _connected(self) -> Any:
        return triton.InferenceServerClient(self._address, ssl=self._tls, channel_args=self._channel_options())


class AsyncGrpcTransport(GrpcBase):
    """One channel to a server, for one loop."""

    @cached_property
    def _client(self) -> Any:
        # A channel belongs to the loop that runs when it is made.
        return self._connected()

    async def stream(self, request: Request, timeout: float | None) -> AsyncGenerator[Outputs, None]:
        arguments = infer_arguments(triton, request, timeout)

        async def requests() -> AsyncGenerator[dict[str, Any], None]:
            yield {"model_name": request.model, **arguments, "enable_empty_final_response": True}

        responses = self._client.stream_infer(
            requests(), stream_timeout=timeout, headers={**self._headers, **stream_headers()}
        )
        is_last = False
        try:
            while not is_last:
                answer: tuple[Any, Any] | None = await self._answer(lambda: anext(responses, None), timeout)
                if answer is None:
                    return
                result, error = answer
                if error is not None:
                    raise client_error(error, self._address, timeout, live=True) from error
                is_last = is_final(result)
                if outputs := outputs_of(result):
                    yield outputs
        finally:
            if not is_last:
                responses.cancel()
            else:  # see ``GrpcTransport.stream``
                with suppress(grpc.RpcError):
                    async for _ in responses:
                        pass

    async def close(self) -> None:
        for client in (*self._retired, *([self._client] if "_client" in vars(self) else [])):
            await client.close()

    def _connected(self) -> Any:
        return aio.InferenceServerClient(self._address, ssl=self._tls, channel_args=self._channel_options())


def stream_headers() -> dict[str, str]:
    """Returns the headers of a stream."""
    return {**WITH_STATUS, **TRACE_HEADERS.get()}


async def _finished(value: T | Awaitable[T]) -> T:
    return await value if isawaitable(value) else value


def is_final(result: Any) -> bool:
    """Returns whether an ``InferResult`` of a stream is the last one."""
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def outputs_of(result: Any) -> Outputs:
    """Returns every output of an ``InferResult`` by its name."""
    try:
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise ServerFailure("the server's response does not have the data that it declares") from error


def with_integer_shapes(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns model metadata with shapes as integers: protobuf's JSON writes 64-bit integers as strings."""
    for tensor in cast("list[dict[str, Any]]", [*metadata.get("inputs", ()), *metadata.get("outputs", ())]):
        tensor["shape"] = [int(side) for side in tensor.get("shape", ())]
    return metadata


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

"""The gRPC half of ``transport``."""

from __future__ import annotations

import queue
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any, TypeVar

import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from glm_image_client.errors import GlmImageClientError, answered, status_name, timed_out, unreachable
from glm_image_client.transport import (
    LIVENESS_SECONDS,
    Endpoint,
    Tensor,
    infer_inputs,
    microseconds,
    with_integer_shapes,
)

T = TypeVar("T")

# gRPC's words around what went wrong: which attempt, which status, which address.
_AROUND_FAULT = re.compile(r"(?:.*last error: )?(?:[A-Z_]+: )?(?:ipv[46]:\S+: )?(.*?)(?:: OK)?", re.DOTALL)


WITH_STATUS = {"triton_grpc_error": "true"}
"""Without it an error in a stream is nothing but its words."""


class GrpcTransport:
    """One channel to a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._tls = endpoint.tls
        self._client = triton.InferenceServerClient(endpoint.address, ssl=endpoint.tls)

    def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``Transport.infer``."""
        arguments = infer_arguments(inputs, request_id, timeout)
        return self._told(lambda: outputs_of(self._client.infer(model, **arguments)), timeout)

    def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> Generator[dict[str, NDArray[Any]], None, None]:
        """See ``Transport.stream``: a connection of its own, as tritonclient has one stream for each."""
        answers: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        with closing(triton.InferenceServerClient(self._address, ssl=self._tls)) as client:
            client.start_stream(
                lambda result, error: answers.put((result, error)), stream_timeout=timeout, headers=WITH_STATUS
            )
            is_last = False
            try:
                with suppress(InferenceServerException):  # of a connection that could not be made the callback tells
                    client.async_stream_infer(model, **stream_arguments(inputs, request_id, timeout))
                while not is_last:
                    outputs, is_last = self._told(partial(next_response, answers), timeout)
                    if outputs:
                        yield outputs
            finally:
                # Triton 2.51 may never let go of a request that is cancelled just after its last response, nor of its
                # model, which then cannot be unloaded.
                client.stop_stream(cancel_requests=not is_last)

    def ready(self, timeout: float | None) -> bool:
        """See ``Transport.ready``."""
        try:
            return bool(self._client.is_server_ready(client_timeout=timeout))
        except InferenceServerException:
            return False

    def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """See ``Transport.model_metadata``."""

        def call() -> dict[str, Any]:
            return with_integer_shapes(self._client.get_model_metadata(model, as_json=True, client_timeout=timeout))

        return self._told(call, timeout)

    def close(self) -> None:
        """See ``Transport.close``."""
        self._client.close()

    def _told(self, call: Callable[[], T], timeout: float | None) -> T:
        try:
            return call()
        except InferenceServerException as error:
            live = not may_be_unreachable(error) or self._live()
            raise told(error, self._address, timeout, live=live) from error

    def _live(self) -> bool:
        try:
            return bool(self._client.is_server_live(client_timeout=LIVENESS_SECONDS))
        except InferenceServerException:
            return False


def infer_arguments(inputs: Sequence[Tensor], request_id: str, timeout: float | None) -> dict[str, Any]:
    """Returns what ``infer`` of tritonclient's clients takes beside the model's name."""
    return {
        "inputs": infer_inputs(triton, inputs),
        "request_id": request_id,
        "timeout": microseconds(timeout),
        "client_timeout": timeout,
    }


def stream_arguments(inputs: Sequence[Tensor], request_id: str, timeout: float | None) -> dict[str, Any]:
    """Returns what a stream of tritonclient takes beside the model's name."""
    arguments = infer_arguments(inputs, request_id, timeout)
    del arguments["client_timeout"]
    return {**arguments, "enable_empty_final_response": True}


def next_response(
    answers: queue.SimpleQueue[tuple[Any, InferenceServerException | None]],
) -> tuple[dict[str, NDArray[Any]], bool]:
    """Waits for a response; returns its outputs and whether it is the last."""
    result, error = answers.get()
    if error is not None:
        raise error
    return outputs_of(result), is_final(result)


def is_final(result: Any) -> bool:
    """Tells whether an ``InferResult`` of a stream is the last one."""
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def outputs_of(result: Any) -> dict[str, NDArray[Any]]:
    """Returns every output of an ``InferResult`` by its name."""
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def may_be_unreachable(error: InferenceServerException) -> bool:
    """Tells whether only a look at the server shows if it answered.

    gRPC says UNAVAILABLE both for a full queue and for a connection that cannot be made, and DEADLINE_EXCEEDED both for
    a slow answer and for a host that swallows packets.
    """
    return status_name(error.status()) in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}


def told(error: InferenceServerException, address: str, timeout: float | None, *, live: bool) -> GlmImageClientError:
    """Returns tritonclient's error as one of this package; ``live`` = there is a server at the address."""
    status, message = status_name(error.status()), error.message() or ""
    late = status == "DEADLINE_EXCEEDED"
    if not live:
        return unreachable(address, "the connection timed out" if late else connection_fault(message))
    return timed_out(timeout) if late else answered(status, message)


def connection_fault(message: str) -> str:
    """Returns what went wrong with a connection, out of gRPC's message."""
    found = _AROUND_FAULT.fullmatch(message)
    return found[1] if found else message

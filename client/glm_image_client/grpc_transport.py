"""The gRPC half of ``transport``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from glm_image_client.errors import GlmImageClientError, answered, status_name, timed_out, unreachable
from glm_image_client.transport import LIVENESS_SECONDS, Endpoint, Tensor, microseconds, with_integer_shapes

T = TypeVar("T")

# gRPC's words around what went wrong: which attempt, which status, which address.
_AROUND_FAULT = re.compile(r"(?:.*last error: )?(?:[A-Z_]+: )?(?:ipv[46]:\S+: )?(.*?)(?:: OK)?", re.DOTALL)


class GrpcTransport:
    """One channel to a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._client = triton.InferenceServerClient(endpoint.address, ssl=endpoint.tls)

    def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``Transport.infer``."""
        server_timeout = microseconds(timeout)
        tensors = [triton.InferInput(name, list(data.shape), datatype) for name, datatype, data in inputs]
        for tensor, (_, _, data) in zip(tensors, inputs, strict=True):
            tensor.set_data_from_numpy(data)

        def call() -> dict[str, NDArray[Any]]:
            result = self._client.infer(
                model, tensors, request_id=request_id, timeout=server_timeout, client_timeout=timeout
            )
            return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

        return self._told(call, timeout)

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
            raise self._error(error, timeout) from error

    def _error(self, error: InferenceServerException, timeout: float | None) -> GlmImageClientError:
        status, message = status_name(error.status()), error.message() or ""
        # gRPC says UNAVAILABLE both for a full queue and for a connection that cannot be made, and DEADLINE_EXCEEDED
        # both for a slow answer and for a host that swallows packets.
        if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED") and not self._live():
            late = status == "DEADLINE_EXCEEDED"
            return unreachable(self._address, "the connection timed out" if late else connection_fault(message))
        return timed_out(timeout) if status == "DEADLINE_EXCEEDED" else answered(status, message)

    def _live(self) -> bool:
        try:
            return bool(self._client.is_server_live(client_timeout=LIVENESS_SECONDS))
        except InferenceServerException:
            return False


def connection_fault(message: str) -> str:
    """Returns what went wrong with a connection, out of gRPC's message."""
    found = _AROUND_FAULT.fullmatch(message)
    return found[1] if found else message

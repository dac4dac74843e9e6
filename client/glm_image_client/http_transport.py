"""The HTTP half of ``transport``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from http.client import HTTPException
from typing import Any, TypeVar

import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from glm_image_client.errors import GlmImageClientError, ServerFailure, answered, timed_out, unreachable
from glm_image_client.transport import (
    CONNECT_SECONDS,
    LIVENESS_SECONDS,
    Endpoint,
    Tensor,
    microseconds,
    with_integer_shapes,
)

T = TypeVar("T")

# tritonclient's words for an error without the JSON that KServe asks for.
_NOT_KSERVE = "an exception occurred in the client while decoding the response"


class HttpTransport:
    """A connection a call: tritonclient's may not cross threads, and takes its timeout when it is made."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._tls = endpoint.tls

    def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``Transport.infer``."""
        server_timeout = microseconds(timeout)
        tensors = [triton.InferInput(name, list(data.shape), datatype) for name, datatype, data in inputs]
        for tensor, (_, _, data) in zip(tensors, inputs, strict=True):
            tensor.set_data_from_numpy(data, binary_data=True)

        def call(client: Any) -> dict[str, NDArray[Any]]:
            result = client.infer(model, tensors, request_id=request_id, timeout=server_timeout)
            names = [output["name"] for output in result.get_response()["outputs"]]
            return {name: result.as_numpy(name) for name in names}

        return self._told(call, timeout)

    def ready(self, timeout: float | None) -> bool:
        """See ``Transport.ready``."""
        try:
            with closing(self._client(timeout)) as client:
                return bool(client.is_server_ready())
        except (OSError, HTTPException, InferenceServerException):
            return False

    def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """See ``Transport.model_metadata``."""
        return self._told(lambda client: with_integer_shapes(client.get_model_metadata(model)), timeout)

    def close(self) -> None:
        """See ``Transport.close``: no connection outlives its call."""

    def _client(self, timeout: float | None) -> Any:
        return triton.InferenceServerClient(
            self._address,
            connection_timeout=CONNECT_SECONDS if timeout is None else min(timeout, CONNECT_SECONDS),
            network_timeout=timeout,
            ssl=self._tls,
        )

    def _told(self, call: Callable[[Any], T], timeout: float | None) -> T:
        try:
            with closing(self._client(timeout)) as client:
                return call(client)
        except InferenceServerException as error:
            raise self._answered(error) from error
        except TimeoutError as error:
            raise self._late(timeout) from error
        except (OSError, HTTPException) as error:
            raise unreachable(self._address, _reason(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ServerFailure(f"what {self._address} answered is not KServe's protocol") from error

    def _answered(self, error: InferenceServerException) -> GlmImageClientError:
        status, message = error.status(), error.message() or ""
        if message.startswith(_NOT_KSERVE):
            return ServerFailure(f"{self._address} answered HTTP {status}, not in KServe's protocol", status)
        return answered(status, message)

    def _late(self, timeout: float | None) -> GlmImageClientError:
        # A host that swallows packets and a slow answer both end in a timeout.
        try:
            with closing(self._client(LIVENESS_SECONDS)) as client:
                client.is_server_live()
        except (OSError, HTTPException):
            return unreachable(self._address, "the connection timed out")
        return timed_out(timeout)


def _reason(error: OSError | HTTPException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    closed = "closed" in str(error).lower()
    return "the connection was closed" if closed else "what listens there does not speak HTTP"

"""The HTTP half of ``transport``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from http.client import OK, HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeVar

import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from glm_image_client import server_sent
from glm_image_client.errors import GlmImageClientError, ServerFailure, answered, timed_out, unreachable
from glm_image_client.transport import (
    CONNECT_SECONDS,
    LIVENESS_SECONDS,
    Endpoint,
    Tensor,
    infer_inputs,
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
        arguments = infer_arguments(inputs, request_id, timeout)
        return self._told(lambda client: outputs_of(client.infer(model, **arguments)), timeout)

    def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> Generator[dict[str, NDArray[Any]], None, None]:
        """See ``Transport.stream``; over Server-Sent Events."""
        body = server_sent.body_of(inputs, request_id, timeout)
        host, _, base = self._address.partition("/")
        connect = HTTPSConnection if self._tls else HTTPConnection
        try:
            with closing(connect(host, timeout=timeout)) as connection:
                connection.request("POST", f"{'/' * bool(base)}{base}{server_sent.path_of(model)}", body)
                answer = connection.getresponse()
                if answer.status != OK:
                    raise server_sent.failure_of(answer.status, answer.read())
                while line := answer.readline():
                    if (outputs := server_sent.outputs_of_line(line)) is not None:
                        yield outputs
        except TimeoutError as error:
            raise self._late(timeout) from error
        except (OSError, HTTPException) as error:
            raise unreachable(self._address, _reason(error)) from error

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
            raise told(error, self._address) from error
        except TimeoutError as error:
            raise self._late(timeout) from error
        except (OSError, HTTPException) as error:
            raise unreachable(self._address, _reason(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise not_kserve(self._address) from error

    def _late(self, timeout: float | None) -> GlmImageClientError:
        # A host that swallows packets and a slow answer both end in a timeout.
        try:
            with closing(self._client(LIVENESS_SECONDS)) as client:
                client.is_server_live()
        except (OSError, HTTPException):
            return unreachable(self._address, "the connection timed out")
        return timed_out(timeout)


def infer_arguments(inputs: Sequence[Tensor], request_id: str, timeout: float | None) -> dict[str, Any]:
    """Returns what ``infer`` of tritonclient's clients takes beside the model's name; they know no wait."""
    return {
        "inputs": infer_inputs(triton, inputs, binary_data=True),
        "request_id": request_id,
        "timeout": microseconds(timeout),
    }


def outputs_of(result: Any) -> dict[str, NDArray[Any]]:
    """Returns every output of an ``InferResult`` by its name."""
    names = [output["name"] for output in result.get_response()["outputs"]]
    return {name: result.as_numpy(name) for name in names}


def told(error: InferenceServerException, address: str) -> GlmImageClientError:
    """Returns tritonclient's error as one of this package."""
    status, message = error.status(), error.message() or ""
    if message.startswith(_NOT_KSERVE):
        return ServerFailure(f"{address} answered HTTP {status}, not in KServe's protocol", status)
    return answered(status, message)


def not_kserve(address: str) -> ServerFailure:
    """Returns the error for an answer that is none."""
    return ServerFailure(f"what {address} answered is not KServe's protocol")


def _reason(error: OSError | HTTPException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    closed = "closed" in str(error).lower()
    return "the connection was closed" if closed else "what listens there does not speak HTTP"

"""The interface of the transports, and what they share: addresses, tensors and timeouts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from glm_image_client.errors import BadArgumentError

ProtocolName = Literal["grpc", "http"]

PROTOCOLS: dict[str, tuple[ProtocolName, bool]] = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORTS: dict[ProtocolName, int] = {"grpc": 8001, "http": 8000}
TLS_PORT = 443
LIVENESS_SECONDS = 2.0
KEEPALIVE_SECONDS = 30.0
"""Less than the minutes after which NATs and load balancers drop an idle connection; ``serve`` permits 5 and above."""


TRACE_HEADERS: ContextVar[Mapping[str, str]] = ContextVar("TRACE_HEADERS", default=MappingProxyType({}))
"""W3C trace context (``traceparent``, ``tracestate``) of the requests that the current task or thread sends."""


class Tensor(NamedTuple):
    """A named input: ``datatype`` is KServe's (BYTES, INT32, ...), ``data`` an array of the matching dtype."""

    name: str
    datatype: str
    data: NDArray[Any]


@dataclass(frozen=True)
class Request:
    """A request to a model; ``request_id`` "" = an id that the server makes."""

    model: str
    tensors: Sequence[Tensor]
    request_id: str


Outputs = dict[str, NDArray[Any]]
"""The outputs of a response by their names."""


class Endpoint(NamedTuple):
    """Where a server listens: ``address`` is ``HOST:PORT``, over HTTP perhaps with a base path."""

    protocol: ProtocolName
    address: str
    tls: bool

    @classmethod
    def parse(cls, url: str | None, protocol: str = "grpc") -> Endpoint:
        """Reads ``HOST[:PORT]`` or ``SCHEME://HOST[:PORT][/PATH]``; a scheme decides the protocol.

        None = this machine and the protocol's default port.
        """
        if not isinstance(protocol, str) or protocol not in DEFAULT_PORTS:
            raise BadArgumentError(f"protocol is {protocol!r}; allowed: grpc, http")
        refused = BadArgumentError(f"url is {url!r}; allowed: HOST:PORT, or grpc, grpcs, http or https://HOST:PORT")
        if url is not None and not isinstance(url, str):
            raise refused
        scheme, separator, rest = (DEFAULT_HOST if url is None else url).strip().rpartition("://")
        scheme = scheme.lower() if separator else protocol
        try:
            parts = urlsplit(f"//{rest}")
            port = parts.port
        except ValueError:
            raise refused from None
        if scheme not in PROTOCOLS or not parts.hostname or any((parts.username, parts.query, parts.fragment)):
            raise refused
        name, tls = PROTOCOLS[scheme]
        path = parts.path.rstrip("/")
        if path and name == "grpc":
            raise refused
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        port = port if port is not None else TLS_PORT if tls else DEFAULT_PORTS[name]
        return cls(name, f"{host}:{port}{path}", tls)


class Transport(ABC):
    """Sends tensors to a server. The methods of a blocking transport never suspend; see ``glm_image_client.core``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._tls = endpoint.tls

    @abstractmethod
    async def infer(self, request: Request, timeout: float | None) -> Outputs:
        """Sends one request and returns its outputs; ``timeout`` is in seconds and also sent to the server.

        Raises:
            RefusedError: the server refuses the request.
            UnreachableError: no server answers, or the connection broke.
            TooManyPingsError: the server permits fewer pings; further calls send none.
            ServerFailure: the server answered anything else, or not in KServe's protocol.
        """

    @abstractmethod
    def stream(self, request: Request, timeout: float | None) -> AsyncGenerator[Outputs, None]:
        """As ``infer``, but yields the outputs of each response; closing the generator cancels the request."""

    @abstractmethod
    async def ready(self, timeout: float | None) -> bool:
        """Returns whether a server answers and all its models are ready; False if no server answers."""

    @abstractmethod
    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """Returns KServe's model metadata: name, versions, platform, inputs, outputs. Raises as ``infer`` does."""

    @abstractmethod
    async def close(self) -> None: ...


def connect(endpoint: Endpoint, *, asynchronous: bool, keepalive: float | None) -> Transport:
    """Returns a transport for asyncio or a blocking one; it connects with the first call.

    ``keepalive`` is the seconds between two pings over gRPC; None = no pings. HTTP has none.
    """
    # The two halves of tritonclient are optional and slow to import.
    if endpoint.protocol == "http":
        from glm_image_client.http_transport import AsyncHttpTransport, HttpTransport  # noqa: PLC0415

        return AsyncHttpTransport(endpoint) if asynchronous else HttpTransport(endpoint)
    from glm_image_client.grpc_transport import AsyncGrpcTransport, GrpcTransport  # noqa: PLC0415

    return AsyncGrpcTransport(endpoint, keepalive) if asynchronous else GrpcTransport(endpoint, keepalive)


def infer_arguments(triton: Any, request: Request, timeout: float | None) -> dict[str, Any]:
    """Returns the arguments of ``infer`` of ``triton``, a half of tritonclient, except the model's name."""
    inputs = [
        triton.InferInput(name, list(data.shape), datatype).set_data_from_numpy(data)
        for name, datatype, data in request.tensors
    ]
    return {"inputs": inputs, "request_id": request.request_id, "timeout": microseconds(timeout)}


def check_keepalive(keepalive: float | None) -> None:
    """Refuses seconds between pings that are not a number above 0."""
    if keepalive is not None and not (math.isfinite(keepalive) and keepalive > 0):
        raise BadArgumentError(f"keepalive is {keepalive}; allowed: seconds above 0, or None")


def microseconds(timeout: float | None) -> int | None:
    """Returns seconds as KServe's ``timeout`` parameter; None stays None."""
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float, np.number)) or not (math.isfinite(timeout) and timeout > 0):
        raise BadArgumentError(f"timeout is {timeout!r}; allowed: seconds above 0")
    return max(1, round(timeout * 1e6))


def object_array(values: Sequence[bytes]) -> NDArray[np.object_]:
    """Returns a BYTES tensor [len(values)]; numpy's own bytes dtype would drop trailing NULs."""
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return array

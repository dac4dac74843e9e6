"""Tensors to a server and back, over gRPC or HTTP, behind one interface."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast
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
CONNECT_SECONDS = 10.0
LIVENESS_SECONDS = 2.0


class Tensor(NamedTuple):
    """A named input: ``datatype`` is KServe's (BYTES, INT32, ...), ``data`` an array of the matching dtype."""

    name: str
    datatype: str
    data: NDArray[Any]


class Endpoint(NamedTuple):
    """Where a server listens: ``address`` is ``HOST:PORT``, over HTTP perhaps with a base path."""

    protocol: ProtocolName
    address: str
    tls: bool

    @classmethod
    def parse(cls, url: str | None, protocol: str = "grpc") -> Endpoint:
        """Reads ``HOST[:PORT]`` or ``SCHEME://HOST[:PORT][/PATH]``; a scheme decides the protocol.

        Args:
            url: None = this machine and the protocol's own port.
            protocol: ``grpc`` or ``http``, used where the URL has no scheme.

        Raises:
            BadArgumentError: the URL or the protocol is none of these.
        """
        if protocol not in DEFAULT_PORTS:
            raise BadArgumentError(f"protocol is {protocol!r}; allowed: grpc, http")
        scheme, separator, rest = (url or DEFAULT_HOST).strip().rpartition("://")
        scheme = scheme.lower() if separator else protocol
        refused = BadArgumentError(f"url is {url!r}; allowed: HOST:PORT, or grpc, grpcs, http or https://HOST:PORT")
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


class Transport(Protocol):
    """What a client needs of a server; safe to use from several threads."""

    def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """Sends one request and returns every output by its name.

        Args:
            model: the model's name.
            inputs: the tensors to send, as binary data.
            request_id: what the server knows it by; "" = an id that the server makes.
            timeout: seconds to wait; the server is told them too.

        Raises:
            RefusedError: the server does not take this request.
            UnreachableError: no server, or the connection broke.
            ServerFailure: anything else the server answered, or an answer that is none.
        """

    def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> Generator[dict[str, NDArray[Any]], None, None]:
        """Sends one request and yields the outputs of each response; the server hears when it is closed.

        Arguments and errors are those of ``infer``.
        """

    def ready(self, timeout: float | None) -> bool:
        """Tells whether a server answers and all its models are ready; never raises for a server that is not there."""

    def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """Returns KServe's model metadata: name, versions, platform, inputs, outputs. Raises as ``infer`` does."""

    def close(self) -> None:
        """Closes every connection."""


class AsyncTransport(Protocol):
    """``Transport`` for asyncio: the same methods, to be awaited, from one loop."""

    async def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``Transport.infer``."""

    def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ``Transport.stream``."""

    async def ready(self, timeout: float | None) -> bool:
        """See ``Transport.ready``."""

    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """See ``Transport.model_metadata``."""

    async def close(self) -> None:
        """See ``Transport.close``."""


def infer_inputs(triton: Any, inputs: Sequence[Tensor], **options: bool) -> list[Any]:
    """Returns tensors as the ``InferInput`` of a half of tritonclient; ``options`` are its own."""
    made = [triton.InferInput(name, list(data.shape), datatype) for name, datatype, data in inputs]
    for one, (_, _, data) in zip(made, inputs, strict=True):
        one.set_data_from_numpy(data, **options)
    return made


def microseconds(timeout: float | None) -> int | None:
    """Returns seconds as KServe's ``timeout`` parameter; None stays None.

    Raises:
        BadArgumentError: the timeout is not a positive number.
    """
    if timeout is None:
        return None
    if not (math.isfinite(timeout) and timeout > 0):
        raise BadArgumentError(f"timeout is {timeout}; allowed: seconds above 0")
    return max(1, round(timeout * 1e6))


def with_integer_shapes(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns model metadata with shapes as integers: protobuf's JSON writes 64-bit integers as strings."""
    for tensor in cast("list[dict[str, Any]]", [*metadata.get("inputs", ()), *metadata.get("outputs", ())]):
        tensor["shape"] = [int(side) for side in tensor.get("shape", ())]
    return metadata


def object_array(values: Sequence[bytes]) -> NDArray[np.object_]:
    """Returns a BYTES tensor [len(values)]; numpy's own bytes dtype would drop trailing NULs."""
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return array

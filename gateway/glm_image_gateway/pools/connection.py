"""Connections to the members of pools: addresses, TLS, and the headers by which a proxy finds a member."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
from tritonclient.grpc import aio

from glm_image_client.grpc_transport import AsyncGrpcTransport
from glm_image_client.transport import Endpoint

KEEPALIVE_SECONDS: Final = 10.0
"""Between two pings: a member that is cut off is noticed by them, though no answer is due."""

MEMBER_HEADER: Final = "x-glm-image-member"
"""The address of the member that a call is for, for a proxy."""
POOL_HEADER: Final = "pool"
"""The pool of that member, ``ar`` or ``dit``."""
POOL_NAMES: Final = {"glm_ar": "ar", "glm_dit": "dit"}


@dataclass(frozen=True)
class TlsFiles:
    """Files in PEM format; None = the system's authorities, and no certificate of this side."""

    authorities: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    @classmethod
    def read(cls, authorities: Path | None, certificate: Path | None, key: Path | None) -> TlsFiles:
        """Reads the files that are named; raises OSError."""
        return cls(*(None if path is None else path.read_bytes() for path in (authorities, certificate, key)))


class MemberAddress(NamedTuple):
    """Where a member listens; ``host`` is the name in its certificate."""

    address: str
    host: str
    tls: bool


class MemberTransport(AsyncGrpcTransport):
    """One channel to a member, perhaps through a proxy.

    Args:
        member: whose address the headers name.
        stage: ``glm_ar`` or ``glm_dit``.
        tls: files for grpcs.
        proxy: where the calls are sent; None = to the member.
    """

    def __init__(self, member: MemberAddress, stage: str, tls: TlsFiles, proxy: Endpoint | None) -> None:
        endpoint = proxy or Endpoint("grpc", member.address, member.tls)
        self._files, self._certificate_host = tls, None if proxy else member.host
        headers = {POOL_HEADER: POOL_NAMES[stage], MEMBER_HEADER: member.address}
        super().__init__(endpoint, KEEPALIVE_SECONDS, headers)

    async def live(self, timeout: float) -> bool:
        """Returns whether the member answers."""
        return await self._succeeds(lambda: self._client.is_server_live(headers=self._headers, client_timeout=timeout))

    def _connected(self) -> Any:
        options: list[tuple[str, Any]] = list(self._channel_options())
        # Members that share an address, as behind a proxy, must not share a connection that one of them breaks.
        options.append(("grpc.use_local_subchannel_pool", 1))
        if self._tls and self._certificate_host is not None:
            options.append(("grpc.ssl_target_name_override", self._certificate_host))
        files = self._files
        # tritonclient would read files anew for each connection.
        credentials = grpc.ssl_channel_credentials(files.authorities, files.key, files.certificate)
        return aio.InferenceServerClient(self._address, creds=credentials if self._tls else None, channel_args=options)


async def resolved(endpoint: Endpoint) -> list[MemberAddress]:
    """Returns the members behind an endpoint: one for each address that its name resolves to.

    Addresses of IPv6 count only where there are none of IPv4: a name such as ``localhost`` has both for one server.

    Raises:
        OSError: the name is unknown.
    """
    host, _, port = endpoint.address.rpartition(":")
    host = host.strip("[]")
    found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    by_family = [sorted({str(place[0]) for kind, *_, place in found if kind == family}) for family in _FAMILIES]
    addresses = next(filter(None, by_family), [])
    return [
        MemberAddress(f"[{address}]:{port}" if ":" in address else f"{address}:{port}", host, endpoint.tls)
        for address in addresses
    ]


_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)

"""The address that a server listens on, as each of its services writes it."""

from __future__ import annotations

import ipaddress
import socket

from glm_image.errors import ConfigurationError, shown

ALLOWED = "an address of this machine or a name of one"


def numeric_address(host: str) -> str:
    """Returns the address of a name, that of IPv4 if it has both; Triton's HTTP takes no names.

    Raises:
        ConfigurationError: the host is empty or unknown.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        # An empty name would be every address.
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM) if name.strip() else []
    except (OSError, UnicodeError):
        found = []
    addresses = sorted((family != socket.AF_INET, str(address[0])) for family, _, _, _, address in found)
    if not addresses:
        raise ConfigurationError(f"--host is {shown(host) or 'empty'}; allowed: {ALLOWED}")
    return addresses[0][1]


def is_ipv6(address: str) -> bool:
    """Returns whether a numeric address is one of IPv6."""
    return ipaddress.ip_address(address).version == 6  # noqa: PLR2004


def authority(address: str, port: int) -> str:
    """Returns an address and its port as URLs have them."""
    return f"[{address}]:{port}" if is_ipv6(address) else f"{address}:{port}"


def service_flags(address: str) -> list[str]:
    """Returns the flags with which Triton's services listen on an address."""
    http, grpc = (f"ipv6:{address}", f"[{address}]") if is_ipv6(address) else (address, address)
    return [f"--http-address={http}", f"--grpc-address={grpc}", f"--metrics-address={http}"]

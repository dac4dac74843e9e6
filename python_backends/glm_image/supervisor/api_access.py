"""Access to a server: the restricted APIs, and the size of a request."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Collection, Sequence

from glm_image.errors import ConfigurationError, shown

CLOSABLE_APIS = ("model-repository", "shared-memory", "trace", "logging")
"""Triton's APIs that change the server or reach beyond it; read-only APIs stay open."""

DEFAULT_MAX_REQUEST_BYTES = 192 * 1024 * 1024
"""Room for four source images of 32 MiB, in base64, and their request."""

# Triton names the header in its refusal.
_KEY = "closed-unless-in-open-apis"


def check_open_apis(opened: Sequence[str]) -> None:
    """Raises ConfigurationError for a name that is not in ``CLOSABLE_APIS``."""
    for name in opened:
        if name not in CLOSABLE_APIS:
            raise ConfigurationError(f"--open-apis has {shown(name)}; allowed: {', '.join(CLOSABLE_APIS)}")


def closing_flags(opened: Collection[str]) -> list[str]:
    """Returns the flags with which Triton restricts every API of ``CLOSABLE_APIS`` except ``opened``."""
    closed = [name for name in CLOSABLE_APIS if name not in opened]
    if not closed:
        return []
    # Triton grants access to requests with a header of this value. Every user of the machine can read the command line,
    # but no header can contain a line break.
    restriction = f"{','.join(closed)}:{_KEY}={secrets.token_hex()}\n"
    return [f"--http-restricted-api={restriction}", f"--grpc-restricted-protocol={restriction}"]


def is_loopback(host: str) -> bool:
    """Whether ``host`` is reachable from this machine only."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)

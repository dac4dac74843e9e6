"""The ports of a server: their choice, their reservation while it loads, and whether its process listens on them."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from glm_image.errors import ConfigurationError, shown
from glm_image.supervisor.addresses import ALLOWED, is_ipv6

_LISTENING = "0A"
"""The state of a listening socket in /proc/net/tcp."""


class ReservedPorts:
    """Ports of ``host``, each held by a bound socket that does not listen.

    Loading takes longer than the choice of a free port lasts: the kernel would give it to the next process that asks
    for any port or opens a connection. It does not give away a port that a socket is bound to, and a server that names
    the port can listen on it all the same, as both sockets have SO_REUSEADDR.

    Args:
        host: the address to listen on, not a name.
        ports: by the flag that sets each; 0 = any free one.

    Raises:
        ConfigurationError: the host is not this machine's, or a port is busy or not allowed for this user.
    """

    def __init__(self, host: str, ports: Mapping[str, int]) -> None:
        self._sockets: dict[str, socket.socket] = {}
        try:
            # A free port, chosen first, could be one that another flag names.
            for flag, port in sorted(ports.items(), key=lambda item: item[1] == 0):
                self._sockets[flag] = _reserve(host, port, flag)
        except BaseException:
            self.release()
            raise
        self.numbers = {flag: int(self._sockets[flag].getsockname()[1]) for flag in ports}

    def release(self) -> None:
        for held in self._sockets.values():
            held.close()


def listens(pid: int, ports: Iterable[int]) -> bool:
    """Whether a process listens on every one of ``ports``; False if the process has ended."""
    try:
        own = _socket_inodes(pid)
        return set(ports) <= {port for inode, port in _listening_sockets(pid) if inode in own}
    except (FileNotFoundError, ProcessLookupError):
        return False


def _listening_sockets(pid: int) -> set[tuple[str, int]]:
    """Returns the inode and the port of every listening TCP socket in the network namespace of a process."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING:
                    found.add((fields[9], int(fields[1].rpartition(":")[2], 16)))
    return found


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    return inodes


def _reserve(host: str, port: int, flag: str) -> socket.socket:
    try:
        return _bound_socket(host, port)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"on which {host} already listens; allowed: a free port, or 0",
            errno.EACCES: "which this user may not listen on; allowed: 1024 and up",
        }
        if error.errno not in reasons:
            raise
        raise ConfigurationError(f"{flag} is {port}, {reasons[error.errno]}") from None


def _bound_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if is_ipv6(host) else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    # As a server binds it: a port whose last connections are in TIME_WAIT is free.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno in {errno.EADDRNOTAVAIL, errno.EINVAL}:
            raise ConfigurationError(f"--host is {shown(host)}; allowed: {ALLOWED}") from None
        raise
    return bound

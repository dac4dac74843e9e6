"""Network namespaces whose link to this machine can be cut; making them needs root and the program ``ip``."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from types import TracebackType
from typing import Final

from local_fleet.fleet import PORTS, Place

FIRST_PORT: Final = 8000
INNER: Final = "inner"


class NetworkNamespace:
    """A namespace with one link to this machine; removed at the end of the block.

    Args:
        number: makes its addresses, 10.213.NUMBER.1 on this machine and 10.213.NUMBER.2 within.

    Raises:
        OSError: it cannot be made, as without root.
    """

    def __init__(self, number: int) -> None:
        self._name = f"glm-image-{secrets.token_hex(4)}"
        self._outer = f"glm{secrets.token_hex(4)}"
        self._network = f"10.213.{number}"

    def __enter__(self) -> NetworkNamespace:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise PermissionError("network namespaces need root and the program ip")
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", self._outer, "type", "veth", "peer", "name", INNER, "netns", self._name)
            _ip("address", "add", f"{self._network}.1/30", "dev", self._outer)
            _ip("link", "set", self._outer, "up")
            self._inside("address", "add", f"{self._network}.2/30", "dev", INNER)
            self._inside("link", "set", "lo", "up")
            self.join()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    @property
    def place(self) -> Place:
        """Where a member of a fleet runs in it."""
        ports = {flag: FIRST_PORT + index for index, flag in enumerate(PORTS)}
        return Place(f"{self._network}.2", ports, ("ip", "netns", "exec", self._name))

    def cut(self) -> None:
        """Drops all that is sent to it and from it."""
        # Its own end: with the outer one down, packets would take this machine's default route.
        self._inside("link", "set", INNER, "down")

    def join(self) -> None:
        """Ends the cut."""
        self._inside("link", "set", INNER, "up")

    def _inside(self, *arguments: str) -> None:
        _ip("-netns", self._name, *arguments)

    def _remove(self) -> None:
        subprocess.run(["ip", "netns", "delete", self._name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self._outer], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")

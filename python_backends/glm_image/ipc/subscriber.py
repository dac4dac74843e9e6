"""One who hears what nodes publish under a topic, for as long as the process lives."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from glm_image.ipc.protocol import EVENTS, Event, address, nodes, unpacked

logger = logging.getLogger(__name__)


class Follower:
    """Hears from a thread of its own. A node that is replaced by one of its name is heard again.

    Args:
        directory: the private folder of sockets.
        prefix: how the nodes' names begin.
        topic: what they publish under.
        heard: called with each event, in the follower's thread.
    """

    def __init__(self, directory: Path, prefix: str, topic: bytes, heard: Callable[[Event], None]) -> None:
        self._directory, self._prefix, self._heard = directory, prefix, heard
        self._known: set[str] = set()
        self._closing = False
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, topic)
        self._wake_up = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Looks for nodes that have come since; returns at once."""
        os.eventfd_write(self._wake_up, 1)

    def close(self) -> None:
        """Hears no more."""
        self._closing = True
        self.look()
        self._thread.join()
        os.close(self._wake_up)

    def _follow(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._wake_up):
            poller.register(source, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll())
            if self._wake_up in ready:
                os.eventfd_read(self._wake_up)
                self._connect()
            if self._socket in ready:
                self._hear(self._socket.recv_multipart()[1:])
        self._context.destroy(linger=0)

    def _connect(self) -> None:
        for name, path in nodes(self._directory).items():
            if name.startswith(self._prefix) and name not in self._known:
                self._known.add(name)
                self._socket.connect(address(path.with_suffix(EVENTS)))

    def _hear(self, frames: list[bytes]) -> None:
        try:
            self._heard(dict(unpacked(frames).fields))
        except Exception:
            logger.exception("an event of the bus cannot be taken")

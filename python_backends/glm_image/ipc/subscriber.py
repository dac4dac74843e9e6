"""Receives the events that instances publish under one topic, for the life of a process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from glm_image.ipc.protocol import EVENTS, Event, address, decode_event, instance_sockets

logger = logging.getLogger(__name__)


class Subscriber:
    """Calls ``on_event`` in a thread of its own with what the instances of a name prefix publish under a topic.

    Reconnects when an instance is replaced.
    """

    def __init__(self, directory: Path, prefix: str, topic: bytes, on_event: Callable[[Event], None]) -> None:
        self._directory, self._prefix, self._on_event = directory, prefix, on_event
        self._connected: set[str] = set()
        self._closing = False
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, topic)
        self._wake_up = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="subscriber", daemon=True)
        self._thread.start()

    def discover(self) -> None:
        """Connects to instances that have started since; does not block."""
        os.eventfd_write(self._wake_up, 1)

    def close(self) -> None:
        self._closing = True
        self.discover()
        self._thread.join()
        os.close(self._wake_up)

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._wake_up):
            poller.register(source, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll())
            if self._wake_up in ready:
                os.eventfd_read(self._wake_up)
                self._connect()
            if self._socket in ready:
                self._handle(self._socket.recv())
        self._context.destroy(linger=0)

    def _connect(self) -> None:
        for name, path in instance_sockets(self._directory, self._prefix).items():
            if name not in self._connected:
                self._connected.add(name)
                self._socket.connect(address(path.with_suffix(EVENTS)))

    def _handle(self, frame: bytes) -> None:
        try:
            self._on_event(decode_event(frame))
        except Exception:
            logger.exception("an event cannot be handled")

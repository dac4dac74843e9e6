"""The client side: calls instances, and receives the events of one request."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from glm_image.ipc.protocol import (
    EVENTS,
    Event,
    Message,
    address,
    decode,
    decode_event,
    encode,
    instance_sockets,
    is_open,
    key_of,
)

MILLISECONDS = 1000


class Replies(NamedTuple):
    """The replies by instance, and the instances that have ended or did not reply in time."""

    replies: dict[str, Message]
    unresponsive: list[str]


def call(sockets: Mapping[str, Path], request: Message, timeout: float) -> Replies:
    """Calls instances and waits ``timeout`` seconds at most for all replies together; callable from any thread.

    The field ``action`` of the request selects the handler.
    """
    context: zmq.Context[Any] = zmq.Context.instance()
    poller: Any = zmq.Poller()  # its stub allows only whole milliseconds
    pending: dict[Any, str] = {}
    replies: dict[str, Message] = {}
    with ExitStack() as stack:
        for name, path in sockets.items():
            if is_open(path):
                socket = stack.enter_context(context.socket(zmq.DEALER))
                socket.setsockopt(zmq.LINGER, 0)
                socket.connect(address(path))
                socket.send_multipart(encode(request), zmq.NOBLOCK)
                poller.register(socket, zmq.POLLIN)
                pending[socket] = name
        deadline = time.monotonic() + timeout
        while pending and (seconds := deadline - time.monotonic()) > 0:
            for socket, _ in poller.poll(seconds * MILLISECONDS):
                replies[pending.pop(socket)] = decode(socket.recv_multipart())
                poller.unregister(socket)
    return Replies(replies, [name for name in sockets if name not in replies])


class EventListener:
    """Receives the events that all instances publish about one request; for one thread, a context manager.

    The first event is the request's present state, if an instance has it. Events that are not read in time are lost.
    """

    def __init__(self, directory: Path, request_id: str) -> None:
        context: zmq.Context[Any] = zmq.Context.instance()
        self._socket: Any = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, key_of(request_id))
        for path in instance_sockets(directory).values():
            self._socket.connect(address(path.with_suffix(EVENTS)))

    def __enter__(self) -> EventListener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def events(self, timeout: float) -> Iterator[Event]:
        """Waits up to ``timeout`` seconds for an event, and yields all events that have arrived."""
        if self._socket.poll(timeout * MILLISECONDS):
            while self._socket.poll(0):
                yield decode_event(self._socket.recv())

"""The client side: calls instances, and receives the events of one request."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import zmq

from glm_image.ipc.protocol import EVENTS, Event, Message, address, decode, encode, instance_sockets, is_open, key_of

MILLISECONDS = 1000


class Replies(NamedTuple):
    """The replies by instance, and the instances that have ended or did not reply in time."""

    replies: dict[str, Message]
    unresponsive: list[str]


def call_all(directory: Path, request: Message, timeout: float, prefix: str = "") -> Replies:
    """Calls every instance whose name begins with ``prefix``; may be called from any thread.

    Args:
        directory: the folder of sockets.
        request: its field ``action`` selects the handler.
        timeout: seconds to wait for all replies together.
        prefix: a model's name; "" = every instance.
    """
    sockets = {name: path for name, path in instance_sockets(directory).items() if name.startswith(prefix)}
    return _call(sockets, request, timeout)


def call_one(directory: Path, name: str, request: Message, timeout: float) -> Message | None:
    """Calls the instance of that name; None = no reply in time. May be called from any thread."""
    sockets = {instance: path for instance, path in instance_sockets(directory).items() if instance == name}
    return _call(sockets, request, timeout).replies.get(name)


def _call(sockets: Mapping[str, Path], request: Message, timeout: float) -> Replies:
    context: zmq.Context[Any] = zmq.Context.instance()
    poller = zmq.Poller()
    pending: dict[Any, str] = {}
    try:
        for name, path in sockets.items():
            if is_open(path):
                socket = context.socket(zmq.DEALER)
                socket.setsockopt(zmq.LINGER, 0)
                pending[socket] = name
                socket.connect(address(path))
                socket.send_multipart(encode(request), zmq.NOBLOCK)
                poller.register(socket, zmq.POLLIN)
        replies = _collect(poller, dict(pending), time.monotonic() + timeout)
    finally:
        for socket in pending:
            socket.close()
    return Replies(replies, [name for name in sockets if name not in replies])


def _collect(poller: Any, pending: dict[Any, str], deadline: float) -> dict[str, Message]:
    replies: dict[str, Message] = {}
    while pending and (seconds := deadline - time.monotonic()) > 0:
        for socket, _ in poller.poll(seconds * MILLISECONDS):
            replies[pending.pop(socket)] = decode(socket.recv_multipart())
            poller.unregister(socket)
    return replies


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def events(self, timeout: float) -> Iterator[Event]:
        """Waits up to ``timeout`` seconds for an event, and yields all events that have arrived."""
        if self._socket.poll(timeout * MILLISECONDS):
            while self._socket.poll(0):
                yield dict(decode(self._socket.recv_multipart()[1:]).fields)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

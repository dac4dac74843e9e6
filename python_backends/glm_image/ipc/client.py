"""The other end of the bus: asks every instance, listens to a request's progress."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import zmq

from glm_image.ipc.protocol import EVENTS, Event, Message, address, is_open, key_of, nodes, packed, unpacked

MILLISECONDS = 1000


class Replies(NamedTuple):
    """What the nodes answered, by their names, and those that did not in time or are gone."""

    answers: dict[str, Message]
    silent: list[str]


def call_all(directory: Path, question: Message, timeout: float, prefix: str = "") -> Replies:
    """Asks every node whose name begins with ``prefix``; may be called from any thread.

    Args:
        directory: the private folder of sockets.
        question: its field ``action`` names what is wanted.
        timeout: seconds to wait for all the answers together.
        prefix: a model's name; "" = every node.
    """
    found = {name: path for name, path in nodes(directory).items() if name.startswith(prefix)}
    return _ask(found, question, timeout)


def call_one(directory: Path, name: str, question: Message, timeout: float) -> Message | None:
    """Asks the node of that name; None = it has not answered in time. May be called from any thread."""
    found = {own: path for own, path in nodes(directory).items() if own == name}
    return _ask(found, question, timeout).answers.get(name)


def _ask(found: Mapping[str, Path], question: Message, timeout: float) -> Replies:
    context: zmq.Context[Any] = zmq.Context.instance()
    poller = zmq.Poller()
    waiting: dict[Any, str] = {}
    try:
        for name, path in found.items():
            if is_open(path):
                socket = context.socket(zmq.DEALER)
                socket.setsockopt(zmq.LINGER, 0)
                waiting[socket] = name
                socket.connect(address(path))
                socket.send_multipart(packed(question), zmq.NOBLOCK)
                poller.register(socket, zmq.POLLIN)
        return _collect(poller, dict(waiting), list(found), time.monotonic() + timeout)
    finally:
        for socket in waiting:
            socket.close()


def _collect(poller: Any, waiting: dict[Any, str], asked: list[str], until: float) -> Replies:
    answers: dict[str, Message] = {}
    while waiting and (left := until - time.monotonic()) > 0:
        for socket, _ in poller.poll(left * MILLISECONDS):
            answers[waiting.pop(socket)] = unpacked(socket.recv_multipart())
            poller.unregister(socket)
    return Replies(answers, [name for name in asked if name not in answers])


class EventListener:
    """Hears what every node publishes of one request; for one thread, a context manager.

    Events begin with where the request is, if it is anywhere. They may be lost where they are not taken.
    """

    def __init__(self, directory: Path, request_id: str) -> None:
        context: zmq.Context[Any] = zmq.Context.instance()
        self._socket: Any = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, key_of(request_id))
        for path in nodes(directory).values():
            self._socket.connect(address(path.with_suffix(EVENTS)))

    def __enter__(self) -> EventListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def events(self, timeout: float) -> Iterator[Event]:
        """Gives what has come; waits up to ``timeout`` seconds for the first event, then ends when there is no more."""
        if self._socket.poll(timeout * MILLISECONDS):
            while self._socket.poll(0):
                yield dict(unpacked(self._socket.recv_multipart()[1:]).fields)

    def close(self) -> None:
        """Stops listening."""
        self._socket.close()

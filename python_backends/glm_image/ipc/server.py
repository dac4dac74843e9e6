"""An instance's end of the bus."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from glm_image.ipc.protocol import CONTROL, EVENTS, Event, Message, address, packed, unpacked

logger = logging.getLogger(__name__)

MAX_EVENTS = 10_000
"""Events that may wait for the thread; of more, the oldest are lost."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

Handler = Callable[[Message], "Message | Future[Message]"]
"""Answers a question in the node's own thread, so at once; with a future where that takes time."""


class IpcServer:
    """Answers questions and publishes events from a thread of its own; nothing here ever waits for anybody.

    Args:
        directory: the private folder of sockets.
        name: names this node's sockets; a node that was killed is replaced by one of the same name.
        handlers: what answers a question, by its field ``action``.
        on_listener: called with a key and whether anybody listens to it: when somebody begins to, and when all have
            ended.

    Raises:
        OSError: the sockets cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        handlers: Mapping[str, Handler],
        on_listener: Callable[[bytes, bool], None] = lambda topic, listens: None,
    ) -> None:
        self._handlers = handlers
        self._on_listener = on_listener
        self._listened: set[bytes] = set()
        self._events: deque[tuple[bytes, Callable[[], Event]]] = deque(maxlen=MAX_EVENTS)
        self._answers: deque[list[bytes]] = deque()
        self._closing = self._asleep = False
        self._paths = [directory / f"{name}{kind}" for kind in (CONTROL, EVENTS)]
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.ROUTER)
        self._publisher = self._context.socket(zmq.XPUB)
        self._publisher.setsockopt(zmq.XPUB_VERBOSE, 1)  # the second listener to a request is told of, too
        for socket, path in zip((self._control, self._publisher), self._paths, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            try:
                socket.bind(address(path))
            except zmq.ZMQError as error:
                self._context.destroy(linger=0)
                raise OSError(error.errno, f"no socket at {path}: {error}") from error
        self._wake_up = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="bus", daemon=True)
        self._thread.start()

    def publish(self, key: bytes, event: Callable[[], Event]) -> None:
        """Publishes an event if somebody listens to it; see ``glm_image.lifecycle.registry.Publish``.

        It is made in the node's thread. Keys are topics: all of one length, since a subscription takes every topic that
        begins with it.
        """
        if key in self._listened:
            self._events.append((key, event))
            self._wake()

    def close(self) -> None:
        """Sends what is published, and ends."""
        self._closing = True
        self._wake()
        self._thread.join()
        os.close(self._wake_up)
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _wake(self) -> None:
        # Only where it sleeps: a write gives the interpreter's lock away, which an engine would have to wait for.
        if self._asleep:
            self._asleep = False
            os.eventfd_write(self._wake_up, 1)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._control, self._publisher, self._wake_up):
            poller.register(source, zmq.POLLIN)
        while not self._closing:
            self._asleep = True  # before the look at what there is to do, so that nothing comes unseen
            has_work = self._closing or self._events or self._answers
            ready = dict(poller.poll(0 if has_work else None))
            self._asleep = False
            if self._wake_up in ready:
                os.eventfd_read(self._wake_up)
            if self._publisher in ready:
                self._note_listener(self._publisher.recv())
            if self._control in ready:
                self._answer(self._control.recv_multipart())
            self._send_what_waits()
        self._context.destroy(linger=0)

    def _note_listener(self, frame: bytes) -> None:
        listens, topic = frame[:1] == b"\1", frame[1:]
        (self._listened.add if listens else self._listened.discard)(topic)
        try:
            self._on_listener(topic, listens)
        except Exception:
            logger.exception("a listener cannot be told where its request is")

    def _answer(self, frames: list[bytes]) -> None:
        caller, question = frames[0], frames[1:]
        try:
            asked = unpacked(question)
            answer = self._handlers[asked.fields["action"]](asked)
        except Exception as error:  # whatever was asked, the others must still be served
            logger.exception("a question cannot be answered")
            answer = Message({"error": f"{type(error).__name__}: {error}"})
        if isinstance(answer, Future):
            answer.add_done_callback(partial(self._take_answer, caller))
        else:
            self._answers.append([caller, *packed(answer)])

    def _take_answer(self, caller: bytes, done: Future[Message]) -> None:
        error = done.exception()
        answer = done.result() if error is None else Message({"error": f"{type(error).__name__}: {error}"})
        self._answers.append([caller, *packed(answer)])
        self._wake()

    def _send_what_waits(self) -> None:
        while self._answers:
            self._send(self._control, self._answers.popleft())
        while self._events:
            topic, event = self._events.popleft()
            try:
                frames = [topic, *packed(Message(event()))]
            except Exception:
                logger.exception("an event cannot be made")
            else:
                self._send(self._publisher, frames)

    @staticmethod
    def _send(socket: Any, frames: list[bytes]) -> None:
        with contextlib.suppress(zmq.Again):  # whoever it is for takes nothing: it is lost
            socket.send_multipart(frames, zmq.NOBLOCK)

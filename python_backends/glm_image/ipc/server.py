"""The server side: replies to requests and publishes events, for one instance."""

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

from glm_image.ipc.protocol import CONTROL, EVENTS, Event, Message, address, decode, encode, encode_event

logger = logging.getLogger(__name__)

MAX_EVENTS = 10_000
"""Events that may wait for the thread; beyond it, the oldest are dropped."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

Handler = Callable[[Message], "Message | Future[Message]"]
"""Returns the reply to a request; a future if that takes time, as handlers run in the server's only thread."""


class IpcServer:
    """Replies to requests and publishes events from a thread of its own; no method blocks on a client.

    Until ``start`` there are no sockets, and ``publish`` does nothing.
    """

    def __init__(self) -> None:
        self._listened_keys: set[bytes] = set()
        self._events: deque[tuple[bytes, Callable[[], Event]]] = deque(maxlen=MAX_EVENTS)
        self._replies: deque[list[bytes]] = deque()
        self._closing = self._asleep = False
        self._thread: threading.Thread | None = None

    def start(
        self,
        directory: Path,
        name: str,
        handlers: Mapping[str, Handler],
        on_listener: Callable[[bytes, bool], None] = lambda key, listens: None,
    ) -> None:
        """Opens the sockets and starts the thread.

        Args:
            directory: the folder of sockets.
            name: the name of this instance's sockets; after a crash, the next server takes over the name.
            handlers: the handlers of requests, by the requests' field ``action``.
            on_listener: called with a key and True for each new listener, with False when the last has left.

        Raises:
            OSError: the sockets cannot be made.
        """
        self._handlers, self._on_listener = handlers, on_listener
        paths = [directory / f"{name}{kind}" for kind in (CONTROL, EVENTS)]
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.ROUTER)
        self._publisher = self._context.socket(zmq.XPUB)
        self._publisher.setsockopt(zmq.XPUB_VERBOSE, 1)  # reports every listener, not just the first of a topic
        for socket, path in zip((self._control, self._publisher), paths, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            try:
                socket.bind(address(path))
            except zmq.ZMQError as error:
                self._context.destroy(linger=0)
                raise OSError(error.errno, f"no socket at {path}: {error}") from error
        self._made = {path: path.stat() for path in paths}
        self._wake_up = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="ipc", daemon=True)
        self._thread.start()

    def publish(self, key: bytes, event: Callable[[], Event]) -> None:
        """Publishes an event if the key has a listener; see ``protocol.Publish``.

        ``event`` is called in the server's thread. All keys have one length, since a subscription matches every topic
        that begins with it.
        """
        if key in self._listened_keys:
            self._events.append((key, event))
            self._wake()

    def close(self) -> None:
        """Sends the published events and ends the thread."""
        if self._thread is None:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        os.close(self._wake_up)
        for path, made in self._made.items():
            # A process that has been loaded in this one's place has sockets of the same names.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), made):
                    path.unlink()

    def _wake(self) -> None:
        # Only if the thread sleeps: the write releases the interpreter lock, which an engine would have to wait for.
        if self._asleep:
            self._asleep = False
            os.eventfd_write(self._wake_up, 1)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._control, self._publisher, self._wake_up):
            poller.register(source, zmq.POLLIN)
        while not self._closing:
            self._asleep = True  # before the check for work, so that no wake-up is lost
            has_work = self._closing or self._events or self._replies
            ready = dict(poller.poll(0 if has_work else None))
            self._asleep = False
            if self._wake_up in ready:
                os.eventfd_read(self._wake_up)
            if self._publisher in ready:
                self._handle_listener(self._publisher.recv())
            if self._control in ready:
                self._handle_request(self._control.recv_multipart())
            self._send_pending()
        self._context.destroy(linger=0)

    def _handle_listener(self, frame: bytes) -> None:
        listens, key = frame[:1] == b"\1", frame[1:]
        (self._listened_keys.add if listens else self._listened_keys.discard)(key)
        try:
            self._on_listener(key, listens)
        except Exception:
            logger.exception("the callback for a listener failed")

    def _handle_request(self, frames: list[bytes]) -> None:
        caller, payload = frames[0], frames[1:]
        try:
            request = decode(payload)
            reply = self._handlers[request.fields["action"]](request)
        except Exception as error:  # an invalid request must not end the server
            logger.exception("a request failed")
            reply = _error_reply(error)
        if isinstance(reply, Future):
            reply.add_done_callback(partial(self._reply_later, caller))
        else:
            self._replies.append([caller, *encode(reply)])

    def _reply_later(self, caller: bytes, done: Future[Message]) -> None:
        error = done.exception()
        self._replies.append([caller, *encode(done.result() if error is None else _error_reply(error))])
        self._wake()

    def _send_pending(self) -> None:
        while self._replies:
            self._send(self._control, self._replies.popleft())
        while self._events:
            key, event = self._events.popleft()
            try:
                frame = encode_event(key, event())
            except Exception:
                logger.exception("an event cannot be built")
            else:
                self._send(self._publisher, [frame])

    @staticmethod
    def _send(socket: Any, frames: list[bytes]) -> None:
        with contextlib.suppress(zmq.Again):  # the receiver's queue is full, and the message is dropped
            socket.send_multipart(frames, zmq.NOBLOCK)


def _error_reply(error: BaseException) -> Message:
    return Message({"error": f"{type(error).__name__}: {error}"})

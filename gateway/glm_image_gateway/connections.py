"""Work that ends with its client's connection, and streams of Server-Sent Events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glm_image_gateway.errors import ApiError
from glm_image_gateway.metrics import Metrics

KEEP_ALIVE_SECONDS: Final = 10.0
KEEP_ALIVE: Final = b": keep-alive\n\n"
HOLD_SECONDS: Final = 1.0
"""Before a stream's head is sent: a request that is refused meanwhile is answered with its status."""

PROGRESS_SECONDS: Final = 0.5
"""Between two messages of progress in a stream."""

T = TypeVar("T")


class DisconnectedError(Exception):
    """The client has closed the connection; nothing can be sent."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T], metrics: Metrics) -> T:
    """Returns the result of work, which is cancelled when the client closes the connection.

    Raises:
        DisconnectedError: it was.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            metrics.cancelled.inc()
            raise DisconnectedError
        return task.result()
    finally:
        await _cancelled(watcher)
        await _cancelled(task)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancels a task and waits until it has ended."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # it has been seen


def event(data: bytes, name: str | None = None) -> bytes:
    """Returns a Server-Sent Event; ``data`` has no line breaks."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return b"".join((head, b"data: ", data, b"\n\n"))


def progress_comment(state: bytes) -> bytes:
    """Returns a comment of a stream with a request's progress.

    OpenAI's libraries return every event, also of a type that they do not know; all clients ignore comments.
    """
    return b": progress " + state + b"\n\n"


class Pace:
    """Passes one message of progress in ``PROGRESS_SECONDS``.

    Args:
        is_held: whether the first one waits ``HOLD_SECONDS``, so that a refusal until then is answered with its status.
    """

    def __init__(self, *, is_held: bool) -> None:
        self._next = time.monotonic() + (HOLD_SECONDS if is_held else 0)

    def is_due(self) -> bool:
        """Returns whether a message may be sent, which then counts as sent."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + PROGRESS_SECONDS
        return True


class EventStream(Response):
    """Sends events as they come, and comments while none come; the end of the connection closes their generator.

    Args:
        events: whole events; an ``ApiError`` that it raises is the answer before the first one, later the last event.
        metrics: of the gateway.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], metrics: Metrics) -> None:
        # Proxies such as nginx would hold events back.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._metrics = events, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_all(scope, receive, send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not sender.done():
                self._metrics.cancelled.inc()
        finally:
            await _cancelled(watcher)
            await _cancelled(sender)
        if not sender.cancelled():
            sender.result()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        following = asyncio.ensure_future(anext(self._events, None))
        try:
            await asyncio.wait({following}, timeout=HOLD_SECONDS)
            if following.done() and isinstance(error := following.exception(), ApiError):
                self._metrics.errors.labels(error.code).inc()
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                await asyncio.wait({following}, timeout=KEEP_ALIVE_SECONDS)
                if not following.done():
                    await _send_body(send, KEEP_ALIVE)
                    continue
                chunk = self._chunk(following)
                if chunk is None:
                    break
                await _send_body(send, chunk)
                if following.exception() is not None:
                    break
                following = asyncio.ensure_future(anext(self._events, None))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _cancelled(following)
            await self._events.aclose()

    def _chunk(self, following: asyncio.Future[bytes | None]) -> bytes | None:
        error = following.exception()
        if error is None:
            return following.result()
        if not isinstance(error, ApiError):
            raise error
        self._metrics.errors.labels(error.code).inc()
        return event(json.dumps({"type": "error", **error.body()}).encode("ascii"), "error")


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})

"""Limits of size and time on the bodies of requests, as ASGI middleware."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm_image_gateway.errors import ApiError
from glm_image_gateway.metrics import Metrics

IDLE_SECONDS: Final = 30.0
"""Longest pause in a body."""
BODY_SECONDS: Final = 600.0
"""Longest duration of a body."""
DISCARD_SECONDS: Final = 10.0
"""Time for which a body that is too large is still read, since many clients read no answer before they have sent it."""
DISCARD_FACTOR: Final = 4
"""Of the largest body: the bytes that are discarded at most."""


class BodyLimits:
    """Refuses bodies that are too large or too slow, before and while they are read."""

    def __init__(self, app: ASGIApp, max_bytes: int, metrics: Metrics) -> None:
        self._app, self._max_bytes, self._metrics = app, max_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reader = _Reader(receive, self._max_bytes)
        try:
            declared = dict(scope["headers"]).get(b"content-length", b"")
            if declared.isdigit() and int(declared) > self._max_bytes:
                raise reader.too_large(int(declared))
            await self._app(scope, reader.receive, send)
        except _BodyRefused as refused:
            self._metrics.errors.labels(refused.error.code).inc()
            await reader.discard()
            response = refused.error.response()
            response.headers["connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)


class _BodyRefused(BaseException):
    """Passes through handlers of ``Exception`` that would answer in its place."""

    def __init__(self, error: ApiError) -> None:
        self.error = error


class _Reader:
    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._deadline = time.monotonic() + BODY_SECONDS
        self._bytes = 0
        self._is_complete = False

    def too_large(self, size: int) -> _BodyRefused:
        message = f"the body has {size} bytes or more; allowed: {self._max_bytes}"
        return _BodyRefused(ApiError(413, message, "request_too_large"))

    async def receive(self) -> Message:
        if self._is_complete:
            return await self._receive()  # the disconnect
        seconds = min(IDLE_SECONDS, self._deadline - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(seconds, 0))
        except (TimeoutError, asyncio.TimeoutError):
            text = f"the body stopped after {self._bytes} bytes; allowed: pauses of at most {IDLE_SECONDS:g} s"
            self._is_complete = True  # nothing more is read
            raise _BodyRefused(ApiError(408, text, "request_timeout", should_retry=False)) from None
        self._count(message)
        if self._bytes > self._max_bytes:
            raise self.too_large(self._bytes)
        return message

    def _count(self, message: Message) -> None:
        self._is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        self._bytes += len(message.get("body", b""))

    async def discard(self) -> None:
        """Reads the rest of a refused body, within limits, so that its sender reads the answer."""
        until = time.monotonic() + DISCARD_SECONDS
        while not self._is_complete and self._bytes < DISCARD_FACTOR * self._max_bytes:
            try:
                self._count(await asyncio.wait_for(self._receive(), max(until - time.monotonic(), 0)))
            except (TimeoutError, asyncio.TimeoutError):
                return

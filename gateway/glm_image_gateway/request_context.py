"""ASGI middleware that records the id, route, duration and bytes of each request."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm_image_client.transport import TRACE_HEADERS
from glm_image_gateway.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER: Final = "x-request-id"
_TRACE_HEADERS: Final = (b"traceparent", b"tracestate")
_ALLOWED_TRACE: Final = re.compile(r"[\x20-\x7e]{1,512}")
_ALLOWED_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET: Final = frozenset({"/health", "/ready", "/metrics", "/page/state"})
"""Routes that are asked every few seconds: they are not logged."""


class RequestTracking:
    """Gives each request its client's id, else a new one, and its client's trace; counts, measures and logs it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        TRACE_HEADERS.set(_trace_headers(scope))
        started, status, sent = time.monotonic(), 0, 0

        async def counted_receive() -> Message:
            message = await receive()
            self._metrics.received_bytes.inc(len(message.get("body", b"")))
            return message

        async def marked_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (REQUEST_ID_HEADER.encode(), request_id.encode())
                message = {**message, "headers": [*message["headers"], header]}
            else:
                sent += len(message.get("body", b""))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, counted_receive, marked_send)
        finally:
            self._metrics.in_flight.dec()
            self._metrics.sent_bytes.inc(sent)
            self._finish(scope, status, time.monotonic() - started, request_id)

    def _finish(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        answered = str(status or 499)  # 499: the client has closed the connection
        self._metrics.requests.labels(route, answered).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if route not in _QUIET:
            caller = scope["state"].get("caller", "-")
            logger.info("%s %s %s %s %.3f s, key %s", request_id, scope["method"], route, answered, seconds, caller)


def _trace_headers(scope: Scope) -> dict[str, str]:
    """Returns the trace context that the client sent; the server continues the trace."""
    given = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACE_HEADERS}
    return {name: value for name, value in given.items() if _ALLOWED_TRACE.fullmatch(value)}


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(REQUEST_ID_HEADER.encode(), b"").decode("latin-1")
    return given if _ALLOWED_ID.fullmatch(given) else uuid.uuid4().hex

"""Which pages may send requests, as ASGI middleware.

Without keys the address is all that protects the gateway. A page of another site, opened in a browser of this machine,
must not use it: neither as a form or a script of its own origin, nor under a name that it lets point to this machine.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from glm_image_gateway.errors import ApiError, shown
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.settings import is_loopback


class OriginCheck:
    """Refuses requests from pages of other origins, and requests to other names than those of this machine.

    Args:
        app: the application.
        origins: origins that are allowed; ``*`` allows all.
        public_host: the host of the gateway's public address.
        metrics: of the gateway.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str], public_host: str | None, metrics: Metrics) -> None:
        self._app, self._origins, self._public_host = app, frozenset(origins), public_host
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            self._metrics.errors.labels(error.code).inc()
            await error.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if not (is_loopback(name) or name == self._public_host or not name):
            message = f"the host is {shown(name)}; allowed without API keys: localhost or a loopback address"
            return ApiError(403, message, "host_not_allowed")
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return None
        if urlsplit(origin).netloc == host:
            return None
        return ApiError(403, f"the origin is {shown(origin)}; allowed: the gateway's own", "origin_not_allowed")

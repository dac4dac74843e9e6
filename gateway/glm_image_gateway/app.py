"""The application: routes, errors, and what surrounds every request."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from glm_image_gateway.body_limits import BodyLimits
from glm_image_gateway.connections import DisconnectedError
from glm_image_gateway.errors import ApiError, shown
from glm_image_gateway.origins import OriginCheck
from glm_image_gateway.request_context import REQUEST_ID_HEADER, RequestTracking
from glm_image_gateway.routes import chat, images, jobs, kserve, page, service
from glm_image_gateway.services import Services


def create_app(services: Services) -> ASGIApp:
    """Returns the application over the parts of a gateway, which its lifespan starts and closes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.start()
        try:
            yield
        finally:
            await services.close()

    api = FastAPI(
        title="GLM-Image",
        version=importlib.metadata.version("glm-image-triton"),
        description="OpenAI's image API in front of a GLM-Image server.",
        lifespan=lifespan,
        # Their pages load scripts from another site.
        docs_url=None,
        redoc_url=None,
    )
    api.state.services = services
    for router in (images.router, chat.router, jobs.router, service.router, kserve.router, page.router):
        api.include_router(router)
    _add_error_handlers(api, services)
    return _surrounded(api, services)


def _surrounded(api: ASGIApp, services: Services) -> ASGIApp:
    """Returns the application within its limits; the outermost layer sees every request."""
    settings = services.settings
    app: ASGIApp = BodyLimits(api, settings.max_body_bytes, services.metrics)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "retry-after"],
        )
    if not services.keys.are_required:
        public_host = urlsplit(settings.public_url or "").hostname
        app = OriginCheck(app, settings.cors_origins, public_host, services.metrics)
    return RequestTracking(app, services.metrics)


def _add_error_handlers(api: FastAPI, services: Services) -> None:
    def answered(error: ApiError) -> Response:
        services.metrics.errors.labels(error.code).inc()
        return error.response()

    @api.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return answered(error)

    @api.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {shown(request.url.path)}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return answered(ApiError(error.status_code, f"{path}: {error.detail}", code))

    @api.exception_handler(DisconnectedError)
    async def gone(_: Request, __: DisconnectedError) -> Response:
        return Response(status_code=499)

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return answered(ApiError(500, f"the gateway failed: {type(error).__name__}", "server_error"))

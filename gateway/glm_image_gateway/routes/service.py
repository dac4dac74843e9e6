"""Models, stored files, health and metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm_image_gateway.documentation import ERRORS
from glm_image_gateway.errors import RESTART_SECONDS
from glm_image_gateway.services import Authenticated, Services, services_of

router = APIRouter(responses=ERRORS)


@router.get("/v1/models", tags=["models"])
async def models(request: Request, caller: Authenticated) -> dict[str, Any]:
    """Returns the names of the model."""
    services = services_of(request)
    return {"object": "list", "data": [_model(services, name) for name in services.settings.model_alias]}


@router.get("/v1/models/{name:path}", tags=["models"])
async def model(request: Request, name: str, caller: Authenticated) -> dict[str, Any]:
    """Returns one name of the model."""
    services = services_of(request)
    return _model(services, services.model_name(name))


def _model(services: Services, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": services.started, "owned_by": "zai-org"}


@router.get("/files/{name}", tags=["files"])
async def file(request: Request, name: str) -> Response:
    """Returns a stored image. Its name is the permission to read it."""
    stored, content = await services_of(request).storage.read(name)
    seconds = max(0, int(stored.expires - time.time()))
    headers = {
        "cache-control": f"private, max-age={seconds}, immutable",
        "x-content-type-options": "nosniff",
        "content-disposition": f'inline; filename="{name}"',
    }
    return Response(content, media_type=stored.media_type, headers=headers)


@router.get("/health", tags=["service"])
async def health() -> dict[str, str]:
    """Returns that the gateway itself works."""
    return {"status": "ok"}


@router.get("/ready", tags=["service"])
async def ready(request: Request) -> Response:
    """Returns whether the server answers and all its models are ready; 503 if not."""
    services = services_of(request)
    is_ready = await services.is_ready()
    headers = {} if is_ready else {"retry-after": str(RESTART_SECONDS)}
    body = {"ready": is_ready, "server": services.settings.server}
    return JSONResponse(body, 200 if is_ready else 503, headers)


@router.get("/metrics", tags=["service"])
async def metrics(request: Request) -> Response:
    """Returns the gateway's metrics, in Prometheus' format."""
    return Response(generate_latest(services_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)

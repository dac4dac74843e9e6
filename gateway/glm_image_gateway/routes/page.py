"""What the page at ``/`` asks for beyond OpenAI's API: the state of the server, and the progress of a request."""

from __future__ import annotations

import contextlib
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from glm_image_client import GlmImageClientError
from glm_image_gateway.errors import api_error
from glm_image_gateway.services import Authenticated, services_of

router = APIRouter(prefix="/page", include_in_schema=False)


@router.get("/state")
async def state(request: Request) -> dict[str, Any]:
    """Returns whether the server is ready, the defaults of its checkpoint if so, and whether requests need a key."""
    services = services_of(request)
    is_ready = await services.is_ready()
    defaults: dict[str, Any] | None = None
    if is_ready:
        # A server started without a run directory does not know them.
        with contextlib.suppress(GlmImageClientError):
            defaults = await services.client.defaults()
    return {"ready": is_ready, "defaults": defaults, "needs_key": services.keys.are_required}


@router.get("/progress/{request_id}")
async def progress(request: Request, request_id: str, caller: Authenticated) -> dict[str, Any]:
    """Returns the state of a request on the server, as ``glm_control`` has it: ``unknown`` before it arrives there."""
    try:
        return await services_of(request).client.status(request_id)
    except GlmImageClientError as error:
        raise api_error(error) from error

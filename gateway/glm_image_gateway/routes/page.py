"""The page at ``/``, and what it asks for beyond OpenAI's API: the server's state."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from glm_image_client import GlmImageClientError
from glm_image_gateway.services import services_of

PAGE: Final = Path(__file__).parents[1] / "static"
PAGE_HEADERS: Final = {
    # The page's own files alone, and the images that it receives.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

router = APIRouter(include_in_schema=False)
_files = StaticFiles(directory=PAGE)


# Routes rather than a mount, which would answer 404 where another route has the path with another method.
@router.get("/")
@router.get("/{name}")
async def file(request: Request, name: str = "index.html") -> Response:
    """Returns a file of the page."""
    response = await _files.get_response(name, request.scope)
    response.headers.update(PAGE_HEADERS)
    return response


@router.get("/page/state")
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

"""``/v1/images/generations`` and ``/v1/images/edits``."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glm_image_gateway.answers import images_answer, json_bytes, json_response, slot, slots, usage
from glm_image_gateway.bodies import validated
from glm_image_gateway.connections import EventStream, Pace, event, progress_comment, while_connected
from glm_image_gateway.documentation import ERRORS, body_of
from glm_image_gateway.generation import Generated
from glm_image_gateway.keys import Caller
from glm_image_gateway.schemas import EditBody, GenerationBody, ImagesAnswer
from glm_image_gateway.services import Authenticated, Services, request_id_of, services_of
from glm_image_gateway.translation import ImageRequest, edit, generation

router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERRORS)


@router.post("/generations", response_model=ImagesAnswer, openapi_extra=body_of(GenerationBody))
async def generate(request: Request, caller: Authenticated) -> Response:
    """Generates images of a prompt."""
    services = services_of(request)
    read = await services.read(request)
    asked = generation(validated(GenerationBody, read.fields), strict=services.settings.strict)
    return await _answer(request, services, caller, asked, "image_generation")


@router.post("/edits", response_model=ImagesAnswer, openapi_extra=body_of(EditBody, is_form=True))
async def edit_images(request: Request, caller: Authenticated) -> Response:
    """Generates images of a prompt and source images."""
    services = services_of(request)
    read = await services.read(request)
    _, asked = edit(read, strict=services.settings.strict)
    return await _answer(request, services, caller, asked, "image_edit")


async def _answer(request: Request, services: Services, caller: Caller, asked: ImageRequest, kind: str) -> Response:
    if asked.stream:
        return EventStream(_events(request, services, caller, asked, kind), services.metrics)
    work = services.generator.generate(asked, caller, request_id_of(request))
    generated = await while_connected(request, work, services.metrics)
    data = await stored_data(request, services, asked, generated)
    return json_response(images_answer(asked, generated, data), in_answer(asked, generated))


def in_answer(asked: ImageRequest, generated: Generated) -> list[bytes]:
    """Returns the images that the answer itself has."""
    return generated.files if asked.response_format == "b64_json" else []


async def stored_data(
    request: Request, services: Services, asked: ImageRequest, generated: Generated
) -> list[dict[str, Any]]:
    """Returns the ``data`` of an answer; images that are asked for as URLs are stored."""
    if asked.response_format == "b64_json":
        return list(slots(generated))
    data = []
    for file in generated.files:
        content = await asyncio.to_thread(base64.b64decode, file)
        stored = await services.storage.save(content, asked.output_format)
        data.append({"url": file_url(request, services, stored.name)})
    return data


def file_url(request: Request, services: Services, name: str) -> str:
    """Returns the address of a stored file."""
    base = services.settings.public_url or str(request.base_url)
    return f"{base.rstrip('/')}/files/{name}"


async def _events(
    request: Request, services: Services, caller: Caller, asked: ImageRequest, kind: str
) -> AsyncGenerator[bytes, None]:
    """Yields the events of a stream: intermediate images, comments of progress, then one event for each image."""
    partials = 0
    pace = Pace(is_held=True)
    stream = services.generator.stream(asked, caller, request_id_of(request))
    async with aclosing(stream):
        async for progress in stream:
            if progress.partial is not None:
                if partials == asked.partial_images:
                    continue
                # The server makes intermediate images as PNG.
                head = {
                    **_head(asked, f"{kind}.partial_image"),
                    "output_format": "png",
                    "partial_image_index": partials,
                }
                partials += 1
                yield _image_event(head, progress.partial)
            elif progress.generated is None:
                if pace.is_due():
                    yield progress_comment(json_bytes(progress.state()))
            else:
                for data in await _completed(request, services, asked, progress.generated, kind):
                    yield data


async def _completed(
    request: Request, services: Services, asked: ImageRequest, generated: Generated, kind: str
) -> list[bytes]:
    data = await stored_data(request, services, asked, generated)
    head = {
        **_head(asked, f"{kind}.completed"),
        "size": generated.size,
        "usage": usage(generated),
        "metadata": generated.metadata,
    }
    if asked.warnings:
        head["warnings"] = list(asked.warnings)
    events = []
    for index, (item, file, seed) in enumerate(zip(data, generated.files, generated.seeds, strict=True)):
        own = {**head, "seeds": [seed], "index": index}
        events.append(
            _image_event(own, file) if "b64_json" in item else event(json_bytes({**own, **item}), own["type"])
        )
    return events


def _head(asked: ImageRequest, name: str) -> dict[str, Any]:
    width, height = asked.options.get("width"), asked.options.get("height")
    size = f"{width}x{height}" if width and height else "auto"
    head = {"type": name, "created_at": int(time.time()), "size": size, "output_format": asked.output_format}
    return {**head, **asked.echoed}


def _image_event(head: dict[str, Any], file: bytes) -> bytes:
    return event(json_bytes({**head, "b64_json": slot(0)}, [file]), head["type"])

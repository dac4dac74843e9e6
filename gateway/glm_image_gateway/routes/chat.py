"""``/v1/chat/completions``, as vLLM-Omni has it for GLM-Image."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glm_image_gateway.answers import chat_usage, json_bytes, json_response, slot
from glm_image_gateway.connections import EventStream, event, while_connected
from glm_image_gateway.documentation import ERRORS, body_of
from glm_image_gateway.generation import Generated, Progress
from glm_image_gateway.keys import Caller
from glm_image_gateway.schemas import ChatBody
from glm_image_gateway.services import Authenticated, Services, request_id_of, services_of
from glm_image_gateway.translation import ImageRequest, chat

PROGRESS_SECONDS: Final = 0.5
"""Between two chunks of progress."""

router = APIRouter(prefix="/v1/chat", tags=["chat"], responses=ERRORS)


@router.post("/completions", openapi_extra=body_of(ChatBody))
async def complete(request: Request, caller: Authenticated) -> Response:
    """Generates images of the last message of the user."""
    services = services_of(request)
    read = await services.read(request)
    body, asked = chat(read, strict=services.settings.strict)
    model = services.model_name(body.model)
    if asked.stream:
        has_usage = bool((body.stream_options or {}).get("include_usage"))
        return EventStream(_chunks(request, services, caller, asked, model, has_usage=has_usage), services.metrics)
    work = services.generator.generate(asked, caller, request_id_of(request))
    generated = await while_connected(request, work, services.metrics)
    answer = {
        **_head("chat.completion", model),
        "choices": [
            {"index": index, "message": {"role": "assistant", "content": [image]}, "finish_reason": "stop"}
            for index, image in enumerate(_images(asked, generated))
        ],
        "usage": chat_usage(generated),
        "seeds": generated.seeds,
        "metadata": generated.metadata,
    }
    if asked.warnings:
        answer["warnings"] = list(asked.warnings)
    return json_response(answer, generated.files)


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _images(asked: ImageRequest, generated: Generated) -> list[dict[str, Any]]:
    """Returns a part of a message's content for each image."""
    urls = (f"data:image/{asked.output_format};base64,{slot(index)}" for index in range(len(generated.files)))
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


async def _chunks(
    request: Request, services: Services, caller: Caller, asked: ImageRequest, model: str, *, has_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yields the chunks of a stream: progress without content, one delta with each image, and the end."""
    head = _head("chat.completion.chunk", model)
    stream = services.generator.stream(asked, caller, request_id_of(request))
    sent: float | None = None
    async with aclosing(stream):
        async for progress in stream:
            if progress.generated is None:
                if sent is not None and time.monotonic() - sent < PROGRESS_SECONDS:
                    continue
                delta: dict[str, Any] = {"role": "assistant", "content": ""} if sent is None else {"content": ""}
                sent = time.monotonic()
                chunk = {**head, "choices": [_choice(0, delta)], "progress": _progress(progress)}
                yield event(json_bytes(chunk))
                continue
            for chunk_bytes in _last_chunks(head, asked, progress.generated, has_usage=has_usage):
                yield chunk_bytes


def _last_chunks(head: dict[str, Any], asked: ImageRequest, generated: Generated, *, has_usage: bool) -> list[bytes]:
    chunks = []
    for index, image in enumerate(_images(asked, generated)):
        delta = {"role": "assistant", "content": [image]}
        # ``json_bytes`` fills the places of an answer in order, from 0.
        text = image["image_url"]["url"].replace(slot(index), slot(0))
        delta["content"] = [{"type": "image_url", "image_url": {"url": text}}]
        chunks.append(event(json_bytes({**head, "choices": [_choice(index, delta)]}, [generated.files[index]])))
    ends = [_choice(index, {}, "stop") for index in range(len(generated.files))]
    last = {**head, "choices": ends, "seeds": generated.seeds, "metadata": generated.metadata}
    if asked.warnings:
        last["warnings"] = list(asked.warnings)
    chunks.append(event(json_bytes(last)))
    if has_usage:
        chunks.append(event(json_bytes({**head, "choices": [], "usage": chat_usage(generated)})))
    return [*chunks, event(b"[DONE]")]


def _choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason}


def _progress(progress: Progress) -> dict[str, Any]:
    return {"stage": progress.stage, "done": progress.done, "total": progress.total, "eta_seconds": progress.eta}

"""``/v1/chat/completions``, as vLLM-Omni has it for GLM-Image."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glm_image_gateway.answers import chat_usage, json_bytes, json_response, slot
from glm_image_gateway.connections import EventStream, Pace, event, while_connected
from glm_image_gateway.documentation import ERRORS, body_of
from glm_image_gateway.generation import Generated
from glm_image_gateway.keys import Caller
from glm_image_gateway.schemas import ChatBody
from glm_image_gateway.services import Authenticated, Services, request_id_of, services_of
from glm_image_gateway.translation import ImageRequest, chat

router = APIRouter(prefix="/v1/chat", tags=["chat"], responses=ERRORS)


@dataclass(frozen=True)
class _Form:
    """The form of an answer.

    Attributes:
        model: the model's name, as it was given.
        images_apart: whether images are in ``images`` of a message whose ``content`` is text, as OpenRouter has it;
            else ``content`` is a list with them, as vLLM-Omni has it.
        has_usage: whether the last chunk of a stream has the usage.
    """

    model: str
    images_apart: bool
    has_usage: bool

    @classmethod
    def of(cls, body: ChatBody, model: str) -> _Form:
        images_apart = {"image", "text"} <= set(body.modalities or ())
        return cls(model, images_apart, has_usage=bool((body.stream_options or {}).get("include_usage")))

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.model}

    def message(self, asked: ImageRequest, index: int) -> dict[str, Any]:
        """Returns a message with image ``index``, or the delta that adds it."""
        url = f"data:image/{asked.output_format};base64,{slot(index)}"
        images = [{"type": "image_url", "image_url": {"url": url}}]
        return {
            "role": "assistant",
            **({"content": "", "images": images} if self.images_apart else {"content": images}),
        }


@router.post("/completions", openapi_extra=body_of(ChatBody))
async def complete(request: Request, caller: Authenticated) -> Response:
    """Generates images of the last message of the user."""
    services = services_of(request)
    read = await services.read(request)
    body, asked = chat(read, strict=services.settings.strict)
    form = _Form.of(body, services.model_name(body.model))
    if asked.stream:
        return EventStream(_chunks(request, services, caller, asked, form), services.metrics)
    work = services.generator.generate(asked, caller, request_id_of(request))
    generated = await while_connected(request, work, services.metrics)
    answer = {
        **form.head("chat.completion"),
        "choices": [
            {"index": index, "message": form.message(asked, index), "finish_reason": "stop"}
            for index in range(len(generated.files))
        ],
        "usage": chat_usage(generated),
        "seeds": generated.seeds,
        "metadata": generated.metadata,
    }
    if asked.warnings:
        answer["warnings"] = list(asked.warnings)
    return json_response(answer, generated.files)


async def _chunks(
    request: Request, services: Services, caller: Caller, asked: ImageRequest, form: _Form
) -> AsyncGenerator[bytes, None]:
    """Yields the chunks of a stream: progress without content, one delta with each image, and the end."""
    head = form.head("chat.completion.chunk")
    stream = services.generator.stream(asked, caller, request_id_of(request))
    pace, role = Pace(is_held=False), {"role": "assistant"}
    async with aclosing(stream):
        async for progress in stream:
            if progress.generated is None:
                if pace.is_due():
                    chunk = {**head, "choices": [_choice(0, {**role, "content": ""})], "progress": progress.state()}
                    role = {}
                    yield event(json_bytes(chunk))
                continue
            for chunk_bytes in _last_chunks(head, asked, progress.generated, form):
                yield chunk_bytes


def _last_chunks(head: dict[str, Any], asked: ImageRequest, generated: Generated, form: _Form) -> list[bytes]:
    # Each chunk has one image, so it is in the first place that ``json_bytes`` fills.
    delta = form.message(asked, 0)
    chunks = [
        event(json_bytes({**head, "choices": [_choice(index, delta)]}, [file]))
        for index, file in enumerate(generated.files)
    ]
    ends = [_choice(index, {}, "stop") for index in range(len(generated.files))]
    last = {**head, "choices": ends, "seeds": generated.seeds, "metadata": generated.metadata}
    if asked.warnings:
        last["warnings"] = list(asked.warnings)
    chunks.append(event(json_bytes(last)))
    if form.has_usage:
        chunks.append(event(json_bytes({**head, "choices": [], "usage": chat_usage(generated)})))
    return [*chunks, event(b"[DONE]")]


def _choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason}

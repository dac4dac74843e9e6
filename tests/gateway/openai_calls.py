"""Calls of OpenAI's library against a gateway; a program for an environment of its own: openai_calls.py URL."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

URL = f"{sys.argv[1]}/v1"
SMALL: dict[str, Any] = {"prompt": "A red fox", "size": "64x64", "extra_body": {"num_inference_steps": 2, "seed": 7}}
client = openai.OpenAI(base_url=URL, api_key="none")


@contextmanager
def raises(kind: type[openai.APIStatusError], code: str, param: str | None) -> Iterator[None]:
    refused = None
    try:
        yield
    except kind as error:
        refused = error
    assert refused is not None, f"no {kind.__name__}"
    assert (refused.code, refused.param) == (code, param), refused
    assert refused.request_id


def image(number: int = 0) -> tuple[str, io.BytesIO]:
    return f"{number}.png", io.BytesIO(PNG)


def check_generations() -> bytes:
    response = client.images.generate(model="gpt-image-1", **SMALL)
    assert response.usage is not None
    assert response.usage.total_tokens > 0
    assert response.size == "64x64"
    assert response.model_extra is not None
    assert response.model_extra["seeds"] == [7]
    urls = client.images.generate(model="glm-image", n=2, response_format="url", **SMALL).data or []
    assert len({item.url for item in urls}) == 2
    return base64.b64decode((response.data or [])[0].b64_json or "")


def check_edits() -> None:
    own = {"num_inference_steps": 1, "lora": {"a": 1}}
    one = client.images.edit(model="glm-image", image=image(), prompt="Snow", size="64x64", extra_body=own)
    assert one.model_extra is not None
    assert one.model_extra["warnings"] == ["unknown fields were ignored: lora"]
    two = client.images.edit(model="glm-image", image=[image(), image(1)], prompt="Snow", size="64x64", extra_body=own)
    assert one.usage is not None
    assert two.usage is not None
    assert two.usage.input_tokens_details.image_tokens == 2 * one.usage.input_tokens_details.image_tokens > 0


def check_streams() -> None:
    fields = {**SMALL, "extra_body": {"num_inference_steps": 40, "seed": 7}, "model": "glm-image", "stream": True}
    events = list(client.images.generate(partial_images=3, **fields))
    # An image that is done within milliseconds may overtake its last intermediate ones.
    count = len(events) - 1
    assert 1 <= count <= 3
    kinds = [event.type for event in events]
    assert kinds == [*["image_generation.partial_image"] * count, "image_generation.completed"], kinds
    assert [event.partial_image_index for event in events[:-1]] == list(range(count))
    assert events[-1].usage.total_tokens > 0
    edits = [event.type for event in client.images.edit(image=image(), partial_images=3, **fields)]
    assert edits == [*["image_edit.partial_image"] * (len(edits) - 1), "image_edit.completed"]
    assert len(edits) > 1


def check_chat() -> None:
    own = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 7}
    message = {"role": "user", "content": "A red fox"}
    for extra in (own, {"extra_body": own}):
        chat = client.chat.completions.create(model="glm-image", messages=[message], extra_body=extra)
        url = chat.choices[0].message.content[0]["image_url"]["url"]
        assert base64.b64decode(url.partition(",")[2]) == PNG
        assert chat.usage.total_tokens > 0
    content = [{"type": "text", "text": "Snow"}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    chunks = list(client.chat.completions.create(model="glm-image", messages=messages, stream=True, extra_body=own))
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-2].choices[0].delta.content[0]["image_url"]["url"].startswith("data:image/png;base64,")


def check_errors() -> None:
    with raises(openai.NotFoundError, "model_not_found", "model"):
        client.images.generate(model="dall-e-3", prompt="x")
    with raises(openai.BadRequestError, "invalid_value", "size"):
        client.images.generate(model="glm-image", prompt="x", size="9000x9000")
    with raises(openai.BadRequestError, "invalid_value", "prompt"):
        list(client.images.generate(model="glm-image", prompt=" ", stream=True))
    try:
        client.with_options(timeout=0.05, max_retries=1).images.generate(model="glm-image", prompt="x")
    except openai.APITimeoutError:
        pass
    else:
        raise AssertionError("no APITimeoutError")


async def check_asyncio() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key="none") as asynchronous:
        calls = (asynchronous.images.generate(model="glm-image", **SMALL) for _ in range(3))
        for response in await asyncio.gather(*calls):
            assert base64.b64decode((response.data or [])[0].b64_json or "") == PNG


PNG = check_generations()
assert PNG.startswith(b"\x89PNG")
check_edits()
check_streams()
check_chat()
check_errors()
asyncio.run(check_asyncio())
assert client.models.retrieve("zai-org/GLM-Image").id in {model.id for model in client.models.list()}
print("done")

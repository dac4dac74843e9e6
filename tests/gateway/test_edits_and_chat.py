"""``/v1/images/edits`` and ``/v1/chat/completions``, through a real server."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from glm_image.supervisor import TritonServer
from pictures import encoded, picture
from running_gateway import RunningGateway, error_of, events_of
from server.kserve import generate

EDITS, CHAT = "/v1/images/edits", "/v1/chat/completions"
PROMPT = "Make it winter"
OWN = {"num_inference_steps": 1, "seed": 7, "width": 96, "height": 64}
FORM = {"prompt": PROMPT, **{name: str(value) for name, value in OWN.items()}}
SOURCE = picture(96, 64, seed=1)
SOURCE_FILE = encoded(SOURCE)
DATA_URL = "data:image/png;base64," + base64.b64encode(SOURCE_FILE).decode()


def pixels_of(item: dict[str, Any]) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def direct(triton: TritonServer) -> str:
    """The edit that Triton gives directly, in base64."""
    values = {"prompt": PROMPT, "image": [DATA_URL], "output_format": "png", **OWN}
    return generate(triton, values)["images_base64"][0].decode()


def test_a_form_gives_the_edit_that_triton_gives_directly(gateway: RunningGateway, direct: str) -> None:
    response = gateway.client.post(EDITS, data=FORM, files={"image": ("a.png", SOURCE_FILE, "image/png")})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["data"][0]["b64_json"] == direct
    assert body["size"] == "96x64"
    assert body["usage"]["input_tokens_details"]["image_tokens"] == body["metadata"]["tokens"]["source"] > 0


@pytest.mark.full  # about a megapixel
def test_size_auto_is_that_of_the_first_image(gateway: RunningGateway) -> None:
    form = {"prompt": PROMPT, "num_inference_steps": "1", "size": "auto"}
    body = gateway.client.post(EDITS, data=form, files={"image": ("a.png", SOURCE_FILE)}).json()
    height, width = pixels_of(body["data"][0]).shape[:2]
    assert body["size"] == f"{width}x{height}"
    assert width / height == SOURCE.width / SOURCE.height


@pytest.mark.parametrize(
    "image", [{"image": DATA_URL}, {"image": [DATA_URL]}, {"images": [{"image_url": DATA_URL}]}, {"url": DATA_URL}]
)
def test_json_has_data_urls(gateway: RunningGateway, direct: str, image: dict[str, Any]) -> None:
    body = gateway.post(EDITS, {"prompt": PROMPT, **OWN, **image}).json()
    assert body["data"][0]["b64_json"] == direct


def test_several_sources_of_a_form(gateway: RunningGateway) -> None:
    files = [("image[]", ("a.png", SOURCE_FILE)), ("image[]", ("b.png", encoded(picture(64, 64, seed=2))))]
    fields = {**FORM, "extra_body[guidance_scale]": "1", "lora[a]": "b"}
    body = gateway.client.post(EDITS, data=fields, files=files).json()
    assert body["warnings"] == ["unknown fields were ignored: lora"]
    one = gateway.client.post(EDITS, data=FORM, files=files[:1]).json()
    assert body["usage"]["input_tokens_details"]["image_tokens"] > one["usage"]["input_tokens_details"]["image_tokens"]


def test_masked_pixels_are_those_of_the_source(gateway: RunningGateway) -> None:
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:, :48] = 0  # the left half may change
    mask = Image.fromarray(np.dstack([np.zeros((64, 96, 3), np.uint8), alpha]))
    files = {"image": ("a.png", SOURCE_FILE), "mask": ("m.png", encoded(mask))}
    plain = gateway.client.post(EDITS, data=FORM, files={"image": ("a.png", SOURCE_FILE)})
    body = gateway.client.post(EDITS, data=FORM, files=files).json()
    pixels = pixels_of(body["data"][0])
    np.testing.assert_array_equal(pixels[:, 48:], np.asarray(SOURCE)[:, 48:])
    np.testing.assert_array_equal(pixels[:, :48], pixels_of(plain.json()["data"][0])[:, :48])
    assert not np.array_equal(pixels[:, :48], np.asarray(SOURCE)[:, :48])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "image", "image is given 0 times; allowed: 1 to 4"),
        ({"image": [DATA_URL] * 5}, "image", "image is given 5 times; allowed: 1 to 4"),
        (
            {"image": "https://example.org/a.png"},
            "image",
            "image is https://example.org/a.png; allowed: a file, a data",
        ),
        ({"url": "file:///etc/passwd"}, "url", "url is file:///etc/passwd; allowed: a file, a data URL or base64"),
        ({"image": [{"file_id": "x"}]}, "image", "image is {'file_id': 'x'}; allowed"),
        ({"image": DATA_URL, "mask": DATA_URL}, "mask", "mask has no alpha channel; allowed: a PNG"),
        ({"image": DATA_URL, "mask": "?"}, "mask", "mask cannot be decoded; allowed: a PNG"),
    ],
)
def test_refused_sources(gateway: RunningGateway, fields: dict[str, Any], param: str, message: str) -> None:
    response = gateway.post(EDITS, {"prompt": PROMPT, **OWN, **fields})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["message"][: len(message)]) == (param, message)


@pytest.mark.parametrize("nested", [True, False])
def test_chat_with_an_image(gateway: RunningGateway, direct: str, nested: bool) -> None:
    content = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": DATA_URL}}]
    messages = [{"role": "user", "content": "ignored"}, {"role": "assistant", "content": "x"}]
    body = {"messages": [*messages, {"role": "user", "content": content}], **({"extra_body": OWN} if nested else OWN)}
    answer = gateway.post(CHAT, body).json()
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    assert choice["message"]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{direct}"}}
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_chat_with_images_apart_from_the_content(gateway: RunningGateway) -> None:
    chat = {"messages": [{"role": "user", "content": "A fox"}], "modalities": ["image", "text"], **OWN, "width": 32}
    message = gateway.post(CHAT, chat).json()["choices"][0]["message"]
    assert message["content"] == ""
    (image,) = message["images"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    with gateway.client.stream("POST", CHAT, json={**chat, "stream": True}) as response:
        deltas = [choice["delta"] for _, data in events_of(response) if data != "[DONE]" for choice in data["choices"]]
    assert [delta["images"] for delta in deltas if "images" in delta] == [[image]]
    assert not any(delta.get("content") for delta in deltas)


def test_chat_of_a_system_message_and_text_fields(gateway: RunningGateway) -> None:
    own = {**OWN, "width": 32, "height": 32}
    chat = {
        "messages": [{"role": "system", "content": "In the style of a woodcut."}, {"role": "user", "content": "A fox"}],
        "temperature": 0,
        "max_tokens": 5,
        "n": 2,
        **own,
    }
    answer = gateway.post(CHAT, chat).json()
    assert answer["warnings"] == ["temperature at top level was ignored, as it is about text; put it into extra_body"]
    whole = gateway.post(
        "/v1/images/generations", {"prompt": "In the style of a woodcut.\nA fox", "n": 2, **own}
    ).json()
    urls = [choice["message"]["content"][0]["image_url"]["url"] for choice in answer["choices"]]
    assert urls == [f"data:image/png;base64,{item['b64_json']}" for item in whole["data"]]


def test_chat_streams_progress_and_the_image_at_the_end(gateway: RunningGateway) -> None:
    body = {
        "messages": [{"role": "user", "content": "A fox"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **OWN,
        "width": 32,
        "height": 32,
    }
    with gateway.client.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = [data for _, data in events_of(response)]
    assert chunks.pop() == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    *_, image, stop, usage = chunks
    assert image["choices"][0]["delta"]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert stop["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["usage"]["completion_tokens"] > 0
    assert all(chunk["choices"][0]["delta"]["content"] == "" for chunk in chunks[:-3])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is []; allowed: a list of messages"),
        ([{"role": "system", "content": "x"}], "messages has none with role user; allowed: one or more"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5; allowed: text or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "audio"}]}],
            "messages[0].content[0] is {'type': 'audio'}; allowed: parts",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}],
            "messages[0].content[0].image_url is http://10.0.0.1/; allowed: a file, a data URL or base64; nothing",
        ),
    ],
)
def test_refused_messages(gateway: RunningGateway, messages: Any, message: str) -> None:
    response = gateway.post(CHAT, {"messages": messages})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["message"][: len(message)]) == ("messages", message)

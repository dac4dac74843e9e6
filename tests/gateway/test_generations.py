"""``/v1/images/generations``, through a real server: fields, formats, results as URLs, errors."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from glm_image_gateway import generation
from running_gateway import RunningGateway, error_of
from server.kserve import generate

PROMPT = "A red fox"
SMALL = {"prompt": PROMPT, "size": "64x32", "num_inference_steps": 1, "seed": 7}
PATH = "/v1/images/generations"


def file_of(item: dict[str, Any]) -> bytes:
    return base64.b64decode(item["b64_json"])


@pytest.fixture(scope="module")
def answer(gateway: RunningGateway) -> httpx.Response:
    return gateway.post(PATH, SMALL, headers={"x-request-id": "fox-7"})


def test_image_is_the_one_that_triton_gives_directly(
    gateway: RunningGateway, triton: TritonServer, answer: httpx.Response
) -> None:
    values = {"prompt": PROMPT, "width": 64, "height": 32, "num_inference_steps": 1, "seed": 7, "output_format": "png"}
    direct = generate(triton, values)["images_base64"][0]
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"].encode() == direct


def test_answer_has_the_fields_of_the_contract(answer: httpx.Response) -> None:
    body = answer.json()
    assert (body["size"], body["seeds"], body["quality"], body["output_format"]) == ("64x32", [7], "auto", "png")
    tokens = body["metadata"]["tokens"]
    usage = body["usage"]
    assert usage["input_tokens"] == usage["input_tokens_details"]["text_tokens"] == tokens["prompt"] > 0
    assert usage["output_tokens"] == tokens["preview"] + tokens["image"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert "warnings" not in body


def test_the_clients_request_id_is_the_servers(gateway: RunningGateway, answer: httpx.Response) -> None:
    assert answer.headers["x-request-id"] == "fox-7"
    with GlmImageClient(gateway.services.settings.url) as client:
        assert client.status("fox-7")["state"] == "finished"


def test_own_fields_are_the_same_in_extra_body_and_as_text(gateway: RunningGateway, answer: httpx.Response) -> None:
    nested = {
        "prompt": PROMPT,
        "model": "gpt-image-1",
        "quality": "high",
        "extra_body": {"width": "64", "height": 32, "num_inference_steps": "1", "seed": 7},
        "user": "someone",
        "n": None,
    }
    assert gateway.post(PATH, nested).json()["data"] == answer.json()["data"]


def test_ten_images_are_two_requests_of_consecutive_seeds(gateway: RunningGateway, answer: httpx.Response) -> None:
    first = 2**64 - 2
    body = gateway.post(PATH, {**SMALL, "size": "32x32", "n": 10, "seed": first}).json()
    assert body["seeds"] == [-2, -1, 0, 1, 2, 3, 4, 5, 6, 7]
    assert len({item["b64_json"] for item in body["data"]}) == 10
    alone = gateway.post(PATH, {**SMALL, "size": "32x32"}).json()
    assert body["data"][9] == alone["data"][0]
    assert body["usage"]["output_tokens"] == 10 * alone["usage"]["output_tokens"]


@pytest.mark.parametrize(("output_format", "compression"), [("jpeg", 5), ("webp", 0), ("jpeg", None)])
def test_formats_and_compression(
    gateway: RunningGateway, answer: httpx.Response, output_format: str, compression: int | None
) -> None:
    body = gateway.post(PATH, {**SMALL, "output_format": output_format, "output_compression": compression}).json()
    file = file_of(body["data"][0])
    with Image.open(io.BytesIO(file)) as image:
        assert (image.format, image.size) == (output_format.upper(), (64, 32))
    if compression is not None:
        best_fields = {**SMALL, "output_format": output_format, "output_compression": 100}
        best = file_of(gateway.post(PATH, best_fields).json()["data"][0])
        assert len(file) < len(best)


def test_url_results_are_stored_under_names_that_cannot_be_guessed(
    gateway: RunningGateway, answer: httpx.Response
) -> None:
    # The default of this name, as in OpenAI's API.
    data = gateway.post(PATH, {**SMALL, "model": "dall-e-2", "n": 2}).json()["data"]
    urls = [item["url"] for item in data]
    assert all(set(item) == {"url"} for item in data)
    assert len(set(urls)) == 2
    got = gateway.client.get(urls[0])
    assert got.content == file_of(answer.json()["data"][0])
    assert got.headers["content-type"] == "image/png"
    assert got.headers["cache-control"].startswith("private, max-age=86")
    name = urls[0].rpartition("/")[2]
    assert len(name) > 32
    for missing in (f"A{name[1:]}", "..%2Fgateway.sqlite3", "x"):
        assert error_of(gateway.client.get(f"/files/{missing}"))["code"] in {"file_not_found", "not_found"}


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"prompt": None}, 400, "prompt", "prompt is missing"),
        ({"prompt": " "}, 400, "prompt", "prompt is  ; allowed: text with something other than white space"),
        ({"prompt": 7}, 400, "prompt", "prompt is 7; allowed: text"),
        ({"n": 11}, 400, "n", "n is 11; allowed: 1 to 10"),
        ({"n": "many"}, 400, "n", "n is many; allowed: 1 to 10"),
        ({"size": "5000x64"}, 400, "size", "width is 5000; allowed: 32 to 2048"),
        ({"size": "large"}, 400, "size", "size is large; allowed: auto, or WIDTHxHEIGHT"),
        ({"quality": "best"}, 400, "quality", "quality is best; allowed: low, medium, high"),
        ({"background": "transparent"}, 400, "background", "background is transparent; allowed: opaque, auto"),
        ({"output_format": "gif"}, 400, "output_format", "output_format is gif; allowed: png, jpeg, webp"),
        ({"output_compression": 101}, 400, "output_compression", "output_compression is 101; allowed: 0 to 100"),
        ({"partial_images": 4}, 400, "partial_images", "partial_images is 4; allowed: 0 to 3"),
        ({"num_inference_steps": 0}, 400, "num_inference_steps", "num_inference_steps is 0; allowed: 1 to 200"),
        ({"guidance_scale": 21}, 400, "guidance_scale", "guidance_scale is 21.0; allowed: 0 to 20"),
        ({"seed": 2**64}, 400, "seed", "seed is 18446744073709551616; allowed: an integer from"),
        ({"seed": 1.5}, 400, "seed", "seed is 1.5; allowed: an integer"),
        ({"top_k": 2**31}, 400, "top_k", "top_k is 2147483648; allowed: a signed 32-bit integer"),
        ({"model": "dall-e-3"}, 404, "model", "model is dall-e-3; allowed: glm-image, zai-org/GLM-Image, gpt-image-1"),
        ({"extra_body": 3}, 400, "extra_body", "extra_body is 3; allowed: an object"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_its_value_and_what_is_allowed(
    gateway: RunningGateway, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    for stream in (False, True):
        response = gateway.post(PATH, {**SMALL, **fields, "stream": stream})
        assert response.status_code == status, response.text
        error = error_of(response)
        assert error["param"] == param
        assert error["message"].startswith(message), error
        assert error["type"] == "invalid_request_error"


def test_unknown_fields_are_named(gateway: RunningGateway) -> None:
    body = gateway.post(PATH, {**SMALL, "lora": "x", "output_compression": 50}).json()
    assert body["warnings"] == [
        "unknown fields were ignored: lora",
        "output_compression was ignored, as output_format is png",
    ]


def test_an_id_in_flight_is_refused(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "ENDING_SECONDS", 0)
    monkeypatch.setitem(gateway.services.generator._ended, "in-flight", asyncio.Event())
    response = gateway.post(PATH, SMALL, headers={"x-request-id": "in-flight"})
    assert (response.status_code, error_of(response)["code"]) == (409, "request_id_in_use")
    assert response.headers["x-should-retry"] == "false"

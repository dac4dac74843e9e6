"""Models, health, metrics, the OpenAPI document, keys, and bodies that are refused."""

from __future__ import annotations

import base64
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from glm_image.supervisor import TritonServer
from glm_image_gateway import body_limits
from glm_image_gateway.keys import new_key
from running_gateway import RunningGateway, error_of, running_gateway

GENERATIONS = "/v1/images/generations"
SMALL = {"prompt": "A red fox", "size": "32x32", "num_inference_steps": 1, "seed": 7}
MAX_BODY = 1 << 20


@pytest.fixture(scope="module")
def keyed(
    triton: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningGateway, Path, dict[str, str]]]:
    """A strict gateway with keys and a small limit of bodies."""
    folder = tmp_path_factory.mktemp("keyed")
    file = folder / "keys.json"
    keys = {name: new_key(file, name) for name in ("fox", "owl")}
    content = json.loads(file.read_text())
    content["keys"][1]["megapixel_steps_per_minute"] = 0.0015
    file.write_text(json.dumps(content))
    settings = {"api_keys": file, "max_body_bytes": MAX_BODY, "strict": True, "cors_origins": ("https://ui.example",)}
    with running_gateway(f"grpc://{triton.grpc_url}", folder / "store", **settings) as gateway:
        yield gateway, file, {name: f"Bearer {key}" for name, key in keys.items()}


def test_models(gateway: RunningGateway) -> None:
    names = [model["id"] for model in gateway.client.get("/v1/models").json()["data"]]
    assert names == ["glm-image", "zai-org/GLM-Image", "gpt-image-1", "dall-e-2"]
    assert gateway.client.get("/v1/models/zai-org/GLM-Image").json()["object"] == "model"
    assert error_of(gateway.client.get("/v1/models/none"))["code"] == "model_not_found"


def test_health_and_readiness(gateway: RunningGateway) -> None:
    assert gateway.client.get("/health").json() == {"status": "ok"}
    assert gateway.client.get("/ready").json()["ready"] is True
    assert error_of(gateway.client.get("/v1/none"))["code"] == "not_found"
    assert error_of(gateway.client.get(GENERATIONS))["code"] == "method_not_allowed"


def test_metrics(gateway: RunningGateway) -> None:
    gateway.post(GENERATIONS, SMALL)
    gateway.post(GENERATIONS, {**SMALL, "n": 11})
    text = gateway.client.get("/metrics").text
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["glm_image_gateway_requests_total", GENERATIONS, "200"] >= 1
    assert samples["glm_image_gateway_errors_total", "invalid_value"] >= 1
    assert samples["glm_image_gateway_stage_seconds_count", "denoise"] >= 1
    assert samples["glm_image_gateway_images_total",] >= 1
    assert samples["glm_image_gateway_in_flight_requests",] == 1  # this one
    assert samples["glm_image_gateway_sent_bytes_total",] > 1000


def test_openapi_document_has_the_fields_and_examples(gateway: RunningGateway) -> None:
    paths = gateway.client.get("/openapi.json").json()["paths"]
    content = paths["/v1/images/edits"]["post"]["requestBody"]["content"]
    for kind in ("application/json", "multipart/form-data"):
        fields = content[kind]["schema"]["properties"]
        assert {"prompt", "image", "mask", "n", "size", "quality", "seed", "num_inference_steps"} <= set(fields)
        assert all(field.get("description") for field in fields.values())
    assert "example" in paths[GENERATIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"/v1/chat/completions", "/v1/images/jobs", "/v1/images/jobs/{job_id}", "/files/{name}"} <= set(paths)


def test_pages_of_other_sites_are_refused(gateway: RunningGateway) -> None:
    for headers, code in (
        ({"origin": "https://evil.example"}, "origin_not_allowed"),
        ({"origin": "null"}, "origin_not_allowed"),
        ({"host": "evil.example", "origin": "http://evil.example"}, "host_not_allowed"),
    ):
        response = gateway.post(GENERATIONS, SMALL, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (403, code)
    assert gateway.client.get("/v1/models", headers={"origin": gateway.url}).status_code == 200


def test_keys(keyed: tuple[RunningGateway, Path, dict[str, str]]) -> None:
    gateway, _, keys = keyed
    for header, code in ((None, "missing_api_key"), ("Bearer x", "invalid_api_key"), ("Basic x", "missing_api_key")):
        for path in (GENERATIONS, "/v1/images/edits", "/v1/chat/completions", "/v1/images/jobs"):
            response = gateway.post(path, SMALL, headers={} if header is None else {"authorization": header})
            assert (response.status_code, error_of(response)["code"]) == (401, code)
            assert error_of(response)["type"] == "authentication_error"
    assert gateway.post(GENERATIONS, SMALL, headers={"authorization": keys["fox"]}).status_code == 200
    assert gateway.client.get("/health").status_code == 200


def test_work_of_a_key_in_a_minute(keyed: tuple[RunningGateway, Path, dict[str, str]]) -> None:
    gateway, _, keys = keyed
    headers = {"authorization": keys["owl"]}
    assert gateway.post(GENERATIONS, SMALL, headers=headers).status_code == 200
    response = gateway.post(GENERATIONS, SMALL, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(response.headers["retry-after"]) <= 60


def test_strict_refuses_unknown_fields(keyed: tuple[RunningGateway, Path, dict[str, str]]) -> None:
    gateway, _, keys = keyed
    response = gateway.post(GENERATIONS, {**SMALL, "lora": 1}, headers={"authorization": keys["fox"]})
    assert (response.status_code, error_of(response)["param"]) == (400, "lora")


def test_cors(keyed: tuple[RunningGateway, Path, dict[str, str]]) -> None:
    gateway, _, _ = keyed
    asked = {"origin": "https://ui.example", "access-control-request-method": "POST"}
    assert gateway.client.options(GENERATIONS, headers=asked).headers["access-control-allow-origin"] == asked["origin"]
    other = gateway.client.options(GENERATIONS, headers={**asked, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_key_can_be_removed_while_the_gateway_runs(
    keyed: tuple[RunningGateway, Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, file, keys = keyed
    monkeypatch.setattr("glm_image_gateway.keys.CHECK_SECONDS", 0)
    before = file.read_text()
    file.write_text('{"keys": [')  # half-written: the keys stay
    assert gateway.client.get("/v1/models", headers={"authorization": keys["owl"]}).status_code == 200
    content = json.loads(before)
    file.write_text(json.dumps({"keys": content["keys"][:1]}))
    assert gateway.client.get("/v1/models", headers={"authorization": keys["owl"]}).status_code == 401
    assert gateway.client.get("/v1/models", headers={"authorization": keys["fox"]}).status_code == 200
    file.write_text(before)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"\xff\xfe{}", "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b"{" + b",".join(b'"f%d": 1' % index for index in range(10_000)) + b"}", "too_many_fields"),
        (b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}", "invalid_json"),
    ],
)
def test_hostile_json(gateway: RunningGateway, content: bytes, code: str) -> None:
    response = gateway.client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (400, code)


def test_a_form_of_many_fields(gateway: RunningGateway) -> None:
    response = gateway.client.post("/v1/images/edits", files=[(f"f{index}", (None, "1")) for index in range(10_000)])
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_form")


@pytest.mark.parametrize("is_chunked", [True, False])
def test_large_bodies(keyed: tuple[RunningGateway, Path, dict[str, str]], is_chunked: bool) -> None:
    gateway, _, keys = keyed
    body = json.dumps({**SMALL, "image": "A" * (2 * MAX_BODY)}).encode()
    content: Any = iter([body]) if is_chunked else body
    response = gateway.client.post("/v1/images/edits", content=content, headers={"authorization": keys["fox"]})
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("kind", "begin"),
    [
        ("application/json", '{"prompt": '),
        ("multipart/form-data; boundary=x", '--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nA'),
    ],
)
def test_a_body_that_stops_half_way(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, kind: str, begin: str
) -> None:
    monkeypatch.setattr(body_limits, "IDLE_SECONDS", 0.05)
    address = urlsplit(gateway.url)
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        head = ("POST /v1/images/edits HTTP/1.1", "host: localhost", f"content-type: {kind}", "content-length: 1000")
        connection.sendall("\r\n".join([*head, "", begin]).encode())
        connection.settimeout(60)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 << 20)) for _ in range(64)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_decompression_bomb(gateway: RunningGateway, field: str) -> None:
    file = base64.b64encode(bomb(30_000)).decode()
    small = base64.b64encode(bomb(32)).decode()
    fields = {"image": file if field == "image" else small, **({"mask": file} if field == "mask" else {})}
    response = gateway.post("/v1/images/edits", {**SMALL, **fields})
    assert (response.status_code, error_of(response)["param"]) == (400, field), response.text

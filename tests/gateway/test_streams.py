"""Streams, and what happens when a client closes its connection."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from glm_image_gateway import connections
from pictures import encoded, picture
from running_gateway import RunningGateway, error_of, events_of, running_gateway

GENERATIONS = "/v1/images/generations"
WAIT_SECONDS = 60
# An image that is done within milliseconds may overtake its last intermediate ones.
SMALL = {"prompt": "A red fox", "size": "64x64", "num_inference_steps": 40, "seed": 7}


def events(
    gateway: RunningGateway, path: str, body: dict[str, Any], *, comments: bool = False
) -> list[tuple[str | None, Any]]:
    with gateway.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return list(events_of(response, comments=comments))


def test_partial_images_then_completed(gateway: RunningGateway) -> None:
    found = events(gateway, GENERATIONS, {**SMALL, "partial_images": 2, "n": 2})
    names = [name for name, _ in found]
    assert names == [*["image_generation.partial_image"] * 2, *["image_generation.completed"] * 2]
    assert names == [data["type"] for _, data in found]
    assert [data["partial_image_index"] for _, data in found[:2]] == [0, 1]
    for _, data in found:
        with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as image:
            assert image.format == data["output_format"].upper() == "PNG"
        assert {"created_at", "size", "quality", "background"} <= set(data)
    plain = gateway.post(GENERATIONS, {**SMALL, "n": 2}).json()
    assert [data["b64_json"] for _, data in found[2:]] == [item["b64_json"] for item in plain["data"]]
    assert found[2][1]["usage"] == plain["usage"]


def test_a_preview_comes_first_where_the_server_makes_one(gateway: RunningGateway) -> None:
    large = {**SMALL, "size": "736x736", "num_inference_steps": 1, "partial_images": 1}
    with gateway.client.stream("POST", GENERATIONS, json={**large, "stream": True}) as response:
        name, data = next((name, data) for name, data in events_of(response) if name is not None)
    assert (name, data["partial_image_index"]) == ("image_generation.partial_image", 0)


def test_an_edits_stream_with_urls(gateway: RunningGateway) -> None:
    source = "data:image/png;base64," + base64.b64encode(encoded(picture(64, 64))).decode()
    body = {**SMALL, "image": source, "response_format": "url", "partial_images": 3}
    *partials, last = events(gateway, "/v1/images/edits", body)
    assert 1 <= len(partials) <= 3
    assert {name for name, _ in partials} == {"image_edit.partial_image"}
    assert last[0] == "image_edit.completed"
    assert "b64_json" not in last[1]
    assert gateway.client.get(last[1]["url"]).headers["content-type"] == "image/png"


def test_comments_while_waiting(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HOLD_SECONDS", 0)
    monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", 0.005)
    found = events(gateway, GENERATIONS, SMALL, comments=True)
    assert (None, ": keep-alive") in found
    (progress, *_) = (json.loads(text[11:]) for name, text in found if name is None and text.startswith(": progress "))
    assert set(progress) == {"stage", "done", "total", "eta_seconds"}
    assert found[-1][0] == "image_generation.completed"


def raw_request(gateway: RunningGateway, path: str, body: dict[str, Any], request_id: str) -> socket.socket:
    """Sends a request and returns its connection."""
    content = json.dumps(body).encode()
    address = urlsplit(gateway.url)
    connection = socket.create_connection((address.hostname or "", address.port or 0))
    head = (
        f"POST {path} HTTP/1.1",
        "host: localhost",
        f"x-request-id: {request_id}",
        f"content-length: {len(content)}",
    )
    connection.sendall("\r\n".join([*head, "", ""]).encode() + content)
    return connection


def wait_for(client: GlmImageClient, request_id: str, *states: str) -> dict[str, Any]:
    until = time.monotonic() + WAIT_SECONDS
    while True:
        status = client.status(request_id)
        if status["state"] in states:
            return status
        assert time.monotonic() < until, status
        time.sleep(0.02)


@pytest.mark.parametrize("stage", ["decode", "denoise"])
@pytest.mark.parametrize("route", ["plain", "stream", "chat"])
def test_closing_the_connection_cancels_the_request(
    gateway: RunningGateway, triton: TritonServer, route: str, stage: str
) -> None:
    request_id = f"{route}-{stage}"
    # Long in the stage in which it is cancelled.
    own = (
        {"width": 512, "height": 512} if stage == "decode" else {"width": 64, "height": 64, "num_inference_steps": 200}
    )
    body = {"prompt": "A red fox", **own, "stream": route == "stream"}
    if route == "chat":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    path = "/v1/chat/completions" if route == "chat" else GENERATIONS
    with GlmImageClient(triton.grpc_url) as client:
        with raw_request(gateway, path, body, request_id):
            until = time.monotonic() + WAIT_SECONDS
            while not any(entry["stage"] == stage for entry in client.status(request_id)["requests"]):
                assert time.monotonic() < until
        assert wait_for(client, request_id, "cancelled", "finished", "failed")["state"] == "cancelled"


def test_an_abandoned_request_can_be_repeated_with_its_id(gateway: RunningGateway) -> None:
    """As a library does whose time-out has passed; the first one may not have ended yet."""
    with raw_request(gateway, GENERATIONS, {**SMALL, "num_inference_steps": 200}, "again") as connection:
        until = time.monotonic() + WAIT_SECONDS
        while "again" not in gateway.services.generator._ended:
            assert time.monotonic() < until
        connection.shutdown(socket.SHUT_RDWR)
    response = gateway.post(GENERATIONS, {**SMALL, "num_inference_steps": 1}, headers={"x-request-id": "again"})
    assert response.status_code == 200, response.text


def test_a_server_that_is_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with running_gateway(f"grpc://127.0.0.1:{port}", tmp_path) as gateway:
        for stream in (False, True):
            response = gateway.post(GENERATIONS, {**SMALL, "stream": stream})
            assert (response.status_code, error_of(response)["code"]) == (503, "server_unavailable")
            assert response.headers["retry-after"] == "5"
        ready = gateway.client.get("/ready")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert gateway.client.get("/health").status_code == 200

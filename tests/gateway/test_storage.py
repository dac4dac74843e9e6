"""Results in S3: a real server of its protocol, in an environment of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import httpx
import pytest

from client_environments import add_packages, environment
from glm_image.supervisor import TritonServer
from running_gateway import RunningGateway, error_of, running_gateway

BUCKET = "images"
GENERATIONS = "/v1/images/generations"
SMALL = {"prompt": "A red fox", "size": "32x32", "num_inference_steps": 1, "seed": 7}
WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with an empty bucket."""
    program = environment("s3") / "bin" / "moto_server"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [program, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        until = time.monotonic() + WAIT_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                assert httpx.put(f"{url}/{BUCKET}").status_code == 200
                break
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield url
        server.terminate()


@pytest.fixture
def gateway(s3: str, triton: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningGateway]:
    add_packages("s3")
    for name, value in {"ENDPOINT_URL": s3, "ACCESS_KEY_ID": "fox", "SECRET_ACCESS_KEY": "fox"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with running_gateway(f"grpc://{triton.grpc_url}", f"s3://{BUCKET}/results", state=tmp_path) as running:
        yield running


def test_results_are_put_read_and_expire(gateway: RunningGateway, s3: str) -> None:
    def stored() -> int:
        return httpx.get(f"{s3}/{BUCKET}").text.count("<Key>results/")

    inline = gateway.post(GENERATIONS, SMALL).json()["data"][0]["b64_json"]
    first = gateway.post(GENERATIONS, {**SMALL, "response_format": "url"}).json()["data"][0]["url"]
    assert stored() == 1
    file = gateway.client.get(first)
    assert (file.content, file.headers["content-type"]) == (base64.b64decode(inline), "image/png")
    asyncio.run(gateway.services.database.run(lambda database: database.execute("UPDATE files SET expires = 0")))
    assert error_of(gateway.client.get(first))["code"] == "file_not_found"
    second = gateway.post(GENERATIONS, {**SMALL, "response_format": "url"}).json()["data"][0]["url"]
    assert stored() == 1
    assert gateway.client.get(second).status_code == 200

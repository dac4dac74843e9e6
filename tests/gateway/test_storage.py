"""Results in S3: a real server of its protocol, in an environment of its own."""

from __future__ import annotations

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


@pytest.fixture(params=[{"store_bytes": 1}, {"file_hours": 1 / 3600}], ids=["size", "expiry"])
def gateway(
    request: pytest.FixtureRequest, s3: str, triton: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningGateway]:
    """A gateway that keeps no second result, as it would be too large, or results of a second."""
    add_packages("s3")
    for name, value in {"ENDPOINT_URL": s3, "ACCESS_KEY_ID": "fox", "SECRET_ACCESS_KEY": "fox"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    store = f"s3://{BUCKET}/{tmp_path.name}"
    with running_gateway(f"grpc://{triton.grpc_url}", store, state=tmp_path, **request.param) as running:
        yield running


def test_results_are_put_read_and_deleted(gateway: RunningGateway, s3: str, tmp_path: Path) -> None:
    def stored() -> int:
        return httpx.get(f"{s3}/{BUCKET}").text.count(f"<Key>{tmp_path.name}/")

    inline = gateway.post(GENERATIONS, SMALL).json()["data"][0]["b64_json"]
    first = gateway.post(GENERATIONS, {**SMALL, "response_format": "url"}).json()["data"][0]["url"]
    assert stored() == 1
    file = gateway.client.get(first)
    has_expired = file.status_code == 404  # on a slow machine
    assert has_expired or file.content == base64.b64decode(inline)
    assert has_expired or file.headers["content-type"] == "image/png"
    until = time.monotonic() + WAIT_SECONDS
    while gateway.services.settings.store_bytes > 1 and gateway.client.get(first).status_code != 404:
        assert time.monotonic() < until
        time.sleep(0.05)
    gateway.post(GENERATIONS, {**SMALL, "response_format": "url"})
    assert stored() == 1
    assert error_of(gateway.client.get(first))["code"] == "file_not_found"

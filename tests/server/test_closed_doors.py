"""The APIs that a server restricts, over both protocols, and those that stay open."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from bench.soak import processes
from glm_image.errors import ConfigurationError
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image.supervisor.api_access import CLOSABLE_APIS
from server.kserve import Values, grpc_infer, http_binary_infer

REQUEST: Values = {"prompt": "a fox", "height": 32, "width": 32, "num_inference_steps": 1, "seed": 3}
REGION = {"key": "/nothing", "offset": 0, "byte_size": 8}
SECONDS = 30

HTTP: dict[str, list[tuple[str, str, Any]]] = {
    "model-repository": [
        ("POST", "/v2/repository/index", {}),
        ("POST", "/v2/repository/models/glm_ar/load", {}),
        ("POST", "/v2/repository/models/glm_ar/unload", {}),
    ],
    "shared-memory": [
        ("GET", "/v2/systemsharedmemory/status", None),
        ("POST", "/v2/systemsharedmemory/region/mine/register", REGION),
        ("POST", "/v2/systemsharedmemory/unregister", {}),
        ("GET", "/v2/cudasharedmemory/status", None),
        ("POST", "/v2/cudasharedmemory/region/mine/register", {"raw_handle": {"b64": ""}, "device_id": 0}),
    ],
    "trace": [
        ("GET", "/v2/trace/setting", None),
        ("POST", "/v2/models/glm_ar/trace/setting", {"trace_level": ["OFF"]}),
    ],
    "logging": [("GET", "/v2/logging", None), ("POST", "/v2/logging", {"log_file": "/tmp/log"})],
}
Client = tritonclient.grpc.InferenceServerClient
GRPC: dict[str, list[Callable[[Client], object]]] = {
    "model-repository": [
        lambda client: client.get_model_repository_index(),
        lambda client: client.load_model("glm_ar"),
        lambda client: client.unload_model("glm_ar"),
    ],
    "shared-memory": [
        lambda client: client.get_system_shared_memory_status(),
        lambda client: client.register_system_shared_memory("mine", "/nothing", 8),
        lambda client: client.unregister_system_shared_memory(),
        lambda client: client.get_cuda_shared_memory_status(),
    ],
    "trace": [lambda client: client.get_trace_settings(), lambda client: client.update_trace_settings("glm_ar", {})],
    "logging": [
        lambda client: client.get_log_settings(),
        lambda client: client.update_log_settings({"log_file": "/tmp/log"}),
    ],
}


def call(
    server: TritonServer, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    with closing(http.client.HTTPConnection(server.http_url, timeout=SECONDS)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body), headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.fixture
def client(triton: TritonServer) -> Iterator[Client]:
    with closing(Client(triton.grpc_url)) as opened:
        yield opened


def test_every_closable_api_has_calls() -> None:
    assert set(HTTP) == set(GRPC) == set(CLOSABLE_APIS)


@pytest.mark.parametrize("api", CLOSABLE_APIS)
def test_restricted_api_is_refused_over_http(triton: TritonServer, api: str) -> None:
    for method, path, body in HTTP[api]:
        status, text = call(triton, method, path, body)
        assert (status, "This API is restricted" in text) == (403, True), (path, text)


@pytest.mark.parametrize("api", CLOSABLE_APIS)
def test_restricted_api_is_refused_over_grpc(client: Client, api: str) -> None:
    for rpc in GRPC[api]:
        with pytest.raises(InferenceServerException, match="This protocol is restricted") as refused:
            rpc(client)
        assert refused.value.status() == "StatusCode.UNAVAILABLE"


def test_key_on_the_command_line_gives_no_access(triton: TritonServer) -> None:
    """Every user of the machine can read the command line."""
    command = Path(f"/proc/{processes(triton)['tritonserver']}/cmdline").read_bytes().decode()
    keys = re.findall(r"--(?:http-restricted-api|grpc-restricted-protocol)=[\w,-]+:([\w-]+)=([^\0]*)", command)
    assert len(keys) == 2
    assert keys[0] == keys[1]
    (name, value) = keys[0]
    assert value.endswith("\n")
    for guess in (value.strip(), f"{value.strip()}\r\n ", ""):
        host, port = triton.http_url.split(":")
        with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
            head = f"GET /v2/logging HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{name}: {guess}\r\n\r\n"
            connection.sendall(head.encode())
            assert not connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    with closing(Client(triton.grpc_url)) as client, pytest.raises(InferenceServerException, match="restricted"):
        client.get_log_settings(headers={f"triton-grpc-protocol-{name}": value.strip()})


def test_apis_for_clients_are_open(triton: TritonServer, client: Client) -> None:
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/glm_image", "/v2/models/glm_image/ready"):
        assert call(triton, "GET", path)[0] == 200, path
    for path in ("/v2/models/glm_image/config", "/v2/models/glm_image/stats", "/v2/models/stats"):
        assert call(triton, "GET", path)[0] == 200, path
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("glm_image")
    assert client.get_server_metadata().name == "triton"
    assert client.get_model_metadata("glm_image").name == "glm_image"
    assert client.get_model_config("glm_image").config.name == "glm_image"
    assert len(client.get_inference_statistics("glm_image").model_stats) == 1
    with closing(http.client.HTTPConnection(triton.metrics_url, timeout=SECONDS)) as connection:
        connection.request("GET", "/metrics")
        assert b"nv_inference_request_success" in connection.getresponse().read()
    np.testing.assert_array_equal(grpc_infer(triton, REQUEST)["images"], http_binary_infer(triton, REQUEST)["images"])


def test_server_listens_on_loopback_only(triton: TritonServer) -> None:
    for url in (triton.http_url, triton.grpc_url, triton.metrics_url):
        port = f"{int(url.rpartition(':')[2]):04X}"
        lines = [
            line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()
        ]
        listening = {line[1] for line in lines if line[1].endswith(f":{port}") and line[3] == "0A"}
        assert listening
        assert all(address.endswith(f"0100007F:{port}") for address in listening)  # of IPv4, or mapped into IPv6


@pytest.mark.parametrize("name", ["inference", "health", "", "shared_memory"])
def test_unknown_apis_cannot_be_opened(tiny_checkpoint: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--open-apis has .*; allowed: model-repository, shared-memory"):
        TritonServer(ServerSettings(tiny_checkpoint, open_apis=(name,)))


def test_non_loopback_address_is_warned_about(tiny_checkpoint: Path) -> None:
    assert TritonServer(ServerSettings(tiny_checkpoint)).exposure is None
    assert TritonServer(ServerSettings(tiny_checkpoint, host="localhost")).exposure is None
    exposed = TritonServer(ServerSettings(tiny_checkpoint, host="0.0.0.0"))
    assert exposed.exposure is not None
    assert "0.0.0.0 is not a loopback address" in exposed.exposure

"""Pools behind Envoy and a gateway: every request gets the images of a server outside of the fleet, once."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

pytest.importorskip("cryptography", reason="the extra fleet is not installed")

from bench.servers import descendants
from glm_image.errors import ConfigurationError
from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from helpers import wait_until
from local_fleet.faults import Faults
from local_fleet.fleet import FleetSettings, LocalFleet, envoy_program
from local_fleet.state import retries_of, wait_whole
from local_fleet.traffic import PICTURES, Picture, Traffic

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CLIENTS = 3
CALL_SECONDS = 60
LONG_SECONDS = 600
OVERHEAD_SECONDS = 600


@pytest.fixture(scope="module")
def envoy() -> Path:
    try:
        return envoy_program()
    except ConfigurationError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> dict[Picture, list[str]]:
    """The base64 of each picture's files, made without a fleet."""
    with LocalPipeline(tiny_checkpoint, "cpu") as pipeline:
        return {picture: images_of(pipeline, picture) for picture in PICTURES}


def images_of(pipeline: LocalPipeline, picture: Picture) -> list[str]:
    width, height = map(int, picture.size.split("x"))
    parameters = GenerationParameters(
        picture.prompt,
        width=width,
        height=height,
        num_inference_steps=picture.steps,
        num_images=picture.images,
        seed=picture.seed,
        output_format="png",
    )
    return [base64.b64encode(file).decode() for file in pipeline.generate(parameters).encoded]


@pytest.fixture(scope="module")
def fleet(
    envoy: Path, tiny_checkpoint: Path, same_threads: None, expected: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalFleet]:
    """One AR member and two DiT members; nothing of it is left after the tests."""
    log = tmp_path_factory.mktemp("fleet") / "log"
    with log.open("w") as file:
        fleet = LocalFleet(FleetSettings(tiny_checkpoint, drain_seconds=60), lambda line: print(line, file=file))
        with fleet:
            wait_whole(fleet, "the start")
            family = descendants(os.getpid())[1:]
            yield fleet
            ours = [pid for process in fleet.processes for pid in descendants(process.pid)]
        assert set(ours) & set(family)
        assert not [pid for pid in ours if Path(f"/proc/{pid}").exists()]
        assert not fleet.folder.exists()


def post(fleet: LocalFleet, picture: Picture) -> list[str]:
    response = httpx.post(f"{fleet.url}/v1/images/generations", json=picture.body, timeout=CALL_SECONDS)
    assert response.status_code == 200, response.text
    return [item["b64_json"] for item in response.json()["data"]]


def requests_of(fleet: LocalFleet, model: str) -> dict[str, int]:
    """Inferences that each member has completed, by the member's name."""
    counts = {}
    for member in fleet.members.values():
        url = f"http://{member.host}:{member.ports['--http-port']}/v2/models/{model}/stats"
        with contextlib.suppress(urllib.request.HTTPError), urllib.request.urlopen(url, timeout=CALL_SECONDS) as reply:
            counts[member.name] = json.load(reply)["model_stats"][0]["inference_count"]
    return counts


@pytest.mark.full  # starts a fleet: a quarter of a minute
def test_dit_members_share_the_images_of_a_request(fleet: LocalFleet, expected: dict[Picture, list[str]]) -> None:
    picture = PICTURES[-1]
    assert picture.images == 4
    before = requests_of(fleet, "glm_dit")
    assert post(fleet, picture) == expected[picture]
    after = requests_of(fleet, "glm_dit")
    assert set(after) == {"dit-0", "dit-1"}
    assert all(after[name] > before[name] for name in after)
    assert set(requests_of(fleet, "glm_ar")) == {"ar-0"}


@pytest.mark.full  # starts a fleet: a quarter of a minute
def test_members_talk_to_those_alone_who_have_a_certificate_of_the_run(fleet: LocalFleet) -> None:
    """Envoy does; a client without TLS, and one with it but without a certificate, do not."""
    member = fleet.members["dit-0"]
    address = member.address
    authority = (fleet.folder / "certificates" / "authority.pem").read_bytes()
    request = service_pb2.ServerReadyRequest()
    for channel in (
        grpc.insecure_channel(address),
        grpc.secure_channel(address, grpc.ssl_channel_credentials(authority)),
    ):
        with channel, pytest.raises(grpc.RpcError) as raised:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerReady(request, timeout=CALL_SECONDS)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    headers = [("pool", "dit"), ("x-glm-image-member", address)]
    with grpc.insecure_channel(fleet.envoy_url.removeprefix("grpc://")) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(request, metadata=headers, timeout=CALL_SECONDS).ready
        # An address that is no member's is refused, not replaced by another's.
        with pytest.raises(grpc.RpcError) as raised:
            stub.ServerReady(request, metadata=[headers[0], (headers[1][0], "127.0.0.1:1")], timeout=CALL_SECONDS)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.full  # four restarts: half a minute
def test_every_request_is_answered_once_whatever_ends(fleet: LocalFleet, expected: dict[Picture, list[str]]) -> None:
    """A DiT member is killed amid images, then Envoy and the gateway are; at last a member is drained."""
    traffic = Traffic(fleet.url, fleet.grpc_url, expected, CLIENTS, seed=1)
    faults = Faults(fleet, traffic, seed=1)
    with traffic:
        faults.inject("kill dit")
        assert wait_until(lambda: [key for key in retries_of(fleet) if 'stage="glm_dit"' in key])
        faults.inject("kill envoy")
        faults.inject("kill gateway")
        wait_whole(fleet, "the end of a member, of Envoy and of the gateway")
        sent = len(traffic.sent)
        assert wait_until(lambda: len(traffic.sent) >= sent + CLIENTS)
        fleet.drain("dit-1")
        sent = len(traffic.sent)
        assert wait_until(lambda: len(traffic.sent) >= sent + CLIENTS)
    assert traffic.faults == []
    counts = traffic.counts()
    assert counts["answered_once"] == len(traffic.sent)
    assert fleet.envoy.starts == fleet.gateway.starts == 2
    assert set(fleet.members) == {"ar-0", "dit-0"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def command(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "local_fleet", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPTS), *sys.path])},
    )


def test_refusals_name_what_is_allowed(envoy: Path, tmp_path: Path) -> None:
    process = command("--checkpoint", str(tmp_path), "--dit", "0")
    _, errors = process.communicate(timeout=CALL_SECONDS)
    assert (process.returncode, errors) == (2, "error: --dit is 0; allowed: 1 or more\n")


@pytest.mark.full
def test_command_starts_and_stops_a_fleet(envoy: Path, tiny_checkpoint: Path, same_threads: None) -> None:
    port = free_port()
    process = command(
        "--checkpoint", str(tiny_checkpoint), "--dit", "1", "--port", str(port), "--grpc-port", "0", "--no-tls"
    )
    assert process.stdout is not None
    assert process.stderr is not None
    names = []
    for line in process.stdout:
        names.append(line.split(":")[0])
        if line.startswith(f"ready: http://127.0.0.1:{port} grpc://127.0.0.1:"):
            break
    assert names == ["ar-0", "dit-0", "envoy", "gateway", "ready"]
    family = descendants(process.pid)
    response = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=PICTURES[0].body, timeout=CALL_SECONDS)
    assert response.status_code == 200, response.text
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=CALL_SECONDS)
    assert process.returncode == 0, errors
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


@pytest.mark.full
def test_command_reports_a_member_that_does_not_start(envoy: Path, tmp_path: Path) -> None:
    process = command("--checkpoint", str(tmp_path), "--port", "0", "--grpc-port", "0")
    _, errors = process.communicate(timeout=CALL_SECONDS)
    assert process.returncode == 1
    assert "has no model_index.json" in errors.splitlines()[-1]


@pytest.mark.full
def test_every_request_is_answered_once_over_ten_minutes(
    envoy: Path, tiny_checkpoint: Path, same_threads: None
) -> None:
    flags = ["--checkpoint", str(tiny_checkpoint), "--seconds", str(LONG_SECONDS), "--seed", "3"]
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / "fleet_chaos.py"), *flags],
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS + OVERHEAD_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    counts: dict[str, Any] = json.loads(ended.stdout)
    assert counts["faults"] == 0
    sent = [count for name, count in counts.items() if name.startswith("sent_") and name != "sent_again_by_clients"]
    assert counts["answered_once"] == sum(sent)
    assert all(sent)
    assert set(counts["disturbances"]) >= {"kill dit", "stop dit", "kill ar", "add and drain dit", "kill gateway"}

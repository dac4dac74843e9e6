"""The supervisor over a real Triton with a small Python model: starts, refusals, ends."""

from __future__ import annotations

import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_image.supervisor import ServerSettings, ServerStartError, TritonServer
from glm_image.watchdog.leftovers import SHARED_MEMORY
from glm_image_client.cli.diagnosis import diagnose
from glm_image_client.transport import Endpoint
from server.served import (
    CONFIG,
    END_TIMEOUT_SECONDS,
    REPOSITORY_ROOT,
    HeldRequest,
    Served,
    call,
    descendants,
    ended,
    wait_for_log,
    wait_gone,
    write_model,
)

MODEL = """
import json, os, subprocess
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils
import glm_image


class TritonPythonModel:
    def initialize(self, args):
        self.profile = json.loads(args["model_config"]).get("parameters", {}).get("profile", {}).get("string_value")

    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.reply(request)]) for request in requests]

    def reply(self, request):
        command = json.loads(pb_utils.get_input_tensor_by_name(request, "command").as_numpy()[0])
        reply = getattr(self, command["do"])(**command.get("with", {}))
        return pb_utils.Tensor("reply", np.array([json.dumps(reply).encode()], dtype=object))

    def describe(self):
        return {
            "package": str(Path(glm_image.__file__).resolve().parent),
            "checkpoint": os.environ["GLM_IMAGE_CHECKPOINT"],
            "profile": self.profile,
        }

    def hold(self, entered, go):
        Path(entered).write_text("entered")
        return Path(go).read_text()

    def spawn(self):
        return subprocess.Popen(["sleep", "3600"], start_new_session=True).pid
"""

FAILING_MODEL = """
from glm_image.errors import CheckpointError


class TritonPythonModel:
    def initialize(self, args):
        raise CheckpointError('vae/config.json has no "latents_mean"')
"""

# Logs that it is loading, and then loads until it is killed.
HANGING_MODEL = """
import os, signal


class TritonPythonModel:
    def initialize(self, args):
        print("loading forever", flush=True)
        signal.pause()
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_model(tmp_path / "models", "worker", MODEL)
    profile = tmp_path / "models" / "worker" / "configs" / "special.pbtxt"
    profile.parent.mkdir()
    profile.write_text(CONFIG + 'parameters { key: "profile" value: { string_value: "special" } }')
    return tmp_path / "models"


@pytest.fixture
def served(checkpoint: Path, repository: Path) -> Iterator[Served]:
    served = Served(checkpoint, repository, "--drain-seconds", "30")
    with ended(served.process):
        served.wait_ready()
        yield served


def test_models_receive_package_checkpoint_and_profile(checkpoint: Path, repository: Path) -> None:
    with TritonServer(ServerSettings(checkpoint, model_repository=repository, profile="special")) as server:
        assert call(server.http_url, "describe") == {
            "package": str(REPOSITORY_ROOT / "python_backends" / "glm_image"),
            "checkpoint": str(checkpoint),
            "profile": "special",
        }
        with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=END_TIMEOUT_SECONDS) as response:
            assert b"nv_inference_request_success" in response.read()
        with socket.create_connection(tuple(server.grpc_url.split(":")), timeout=END_TIMEOUT_SECONDS):
            pass
        prefix = server.shm_prefix
        assert list(SHARED_MEMORY.glob(f"{prefix}*"))
        assert server.returncode is None
    assert server.returncode == 0
    assert not list(SHARED_MEMORY.glob(f"{prefix}*"))


def test_servers_run_side_by_side_and_stop_independently(checkpoint: Path, repository: Path, served: Served) -> None:
    with TritonServer(ServerSettings(checkpoint, model_repository=repository)) as other:
        assert other.http_url != served.http_url
        assert served.stop(signal.SIGTERM) == 0
        served.assert_gone()
        assert isinstance(call(other.http_url, "describe"), dict)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_waits_for_the_request_in_flight(served: Served, number: signal.Signals, tmp_path: Path) -> None:
    held = HeldRequest(served.http_url, tmp_path)
    served.process.send_signal(number)
    assert held.release() == "done"
    assert served.process.wait(END_TIMEOUT_SECONDS) == 0
    served.assert_gone()


def test_second_signal_kills(served: Served, tmp_path: Path) -> None:
    held = HeldRequest(served.http_url, tmp_path)
    served.process.send_signal(signal.SIGTERM)
    wait_for_log(served, "Signal (15) received")
    assert served.stop(signal.SIGTERM) == 0
    served.assert_gone()
    assert isinstance(held.wait(), OSError)


def test_request_longer_than_the_drain_is_cut_off(checkpoint: Path, repository: Path, tmp_path: Path) -> None:
    served = Served(checkpoint, repository, "--drain-seconds", "1")
    with ended(served.process):
        served.wait_ready()
        held = HeldRequest(served.http_url, tmp_path)
        assert served.stop(signal.SIGTERM) == 0
        served.assert_gone()
        assert isinstance(held.wait(), OSError)


def test_nothing_outlives_a_killed_supervisor(served: Served) -> None:
    orphan = call(served.http_url, "spawn")
    assert isinstance(orphan, int)
    assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    served.assert_gone()
    wait_gone(orphan)


def test_nothing_outlives_a_killed_watchdog(checkpoint: Path, repository: Path) -> None:
    served = Served(checkpoint, repository, "--max-restarts", "0")
    with ended(served.process):
        served.wait_ready()
        os.kill(served.watchdog, signal.SIGKILL)
        assert served.process.wait(END_TIMEOUT_SECONDS) == 3
        served.assert_gone()


def test_process_started_by_a_model_ends_with_the_server(served: Served) -> None:
    orphan = call(served.http_url, "spawn")
    assert isinstance(orphan, int)
    assert served.stop(signal.SIGTERM) == 0
    wait_gone(orphan)


def test_failing_model_is_reported_with_its_own_error(checkpoint: Path, repository: Path) -> None:
    write_model(repository, "broken", FAILING_MODEL)
    served = Served(checkpoint, repository)
    with ended(served.process):
        assert served.process.wait(END_TIMEOUT_SECONDS) == 1
        last_line = served.log.read_text().splitlines()[-1]
        assert last_line == 'error: broken failed to load: vae/config.json has no "latents_mean"'
        with pytest.raises(ServerStartError, match="broken failed to load: vae"):
            TritonServer(ServerSettings(checkpoint, model_repository=repository)).__enter__()


def test_model_without_code_is_reported(checkpoint: Path, repository: Path) -> None:
    write_model(repository, "empty", "")
    (repository / "empty" / "1" / "model.py").unlink()
    with pytest.raises(ServerStartError, match=r"Python model file not found in '.*/empty/1/model\.py'"):
        TritonServer(ServerSettings(checkpoint, model_repository=repository)).__enter__()


def test_stop_while_loading(checkpoint: Path, repository: Path) -> None:
    """Until then the command finds that the server is loading."""
    write_model(repository, "slow", HANGING_MODEL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served = Served(checkpoint, repository, "--grpc-port", str(port))
    with ended(served.process):
        for text in ("loading forever", "successfully loaded 'worker'"):  # in either order
            wait_for_log(served, text)
        family = descendants(served.process.pid)
        assert len(family) == 4
        found = diagnose(Endpoint.parse(f"127.0.0.1:{port}"))
        assert found == (f"the server at 127.0.0.1:{port} is loading its models; wait for it with --wait", True)
        assert served.stop(signal.SIGTERM) == 0
        for pid in family:
            wait_gone(pid)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "tpu"], "error: --profile is tpu; allowed: special"),
        (["--http-port", "{busy}"], "error: --http-port is {busy}, on which 127.0.0.1 already listens"),
        (["--checkpoint", "/nowhere"], "error: --checkpoint is /nowhere, which is not a folder"),
    ],
)
def test_invalid_flags_are_refused(checkpoint: Path, repository: Path, flags: list[str], message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        busy = str(listener.getsockname()[1])
        served = Served(checkpoint, repository, *(flag.format(busy=busy) for flag in flags))
        with ended(served.process):
            assert served.process.wait(END_TIMEOUT_SECONDS) == 2
    (line,) = served.log.read_text().splitlines()
    assert line.startswith(message.format(busy=busy))


@pytest.mark.parametrize("service", ["http", "metrics"])  # Triton binds the port of its metrics last
def test_port_taken_while_the_server_loads_is_reported(checkpoint: Path, repository: Path, service: str) -> None:
    server = TritonServer(ServerSettings(checkpoint, model_repository=repository))
    host, _, port = getattr(server, f"{service}_url").partition(":")
    with (
        socket.create_server((host, int(port))),
        pytest.raises(ServerStartError, match=f"Socket '{host}:{port}' already in use"),
    ):
        server.__enter__()

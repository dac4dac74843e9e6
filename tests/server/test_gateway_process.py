"""``serve --gateway`` runs the gateway and a real Triton with a small model; the gateway also runs by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from glm_image.errors import ConfigurationError
from glm_image.supervisor.cli import EXIT_DONE
from glm_image.supervisor.gateway import Gateway, GatewayFlags
from glm_image.supervisor.restarts import RestartPolicy
from server.served import END_TIMEOUT_SECONDS, Served, descendants, ended, wait_for_log, wait_gone, write_model

MODEL = """
class TritonPythonModel:
    def execute(self, requests):
        return []
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("GLM_IMAGE_GATEWAY_STORE", str(tmp_path / "store"))
    write_model(tmp_path / "models", "worker", MODEL)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model_index.json").write_text("{}")
    return Served(checkpoint, tmp_path / "models", "--gateway", "0", "--max-restarts", "1", "--drain-seconds", "5")


def gateway_of(served: Served) -> tuple[str, int]:
    """Waits until the gateway is announced; returns its address and its process."""
    assert served.process.stdout is not None
    lines = [served.process.stdout.readline() for _ in range(2)]
    assert lines[0].startswith("ready: http://127.0.0.1:"), served.log.read_text()
    assert lines[1].startswith("gateway: http://127.0.0.1:"), served.log.read_text()
    return lines[1].split()[1], gateway_process(served)


def gateway_process(served: Served) -> int:
    (pid,) = (
        pid
        for pid in descendants(served.process.pid)
        if b"glm_image_gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return pid


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=END_TIMEOUT_SECONDS) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def wait_healthy(url: str) -> None:
    until = time.monotonic() + END_TIMEOUT_SECONDS
    while True:
        try:
            get(f"{url}/health")
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)
        else:
            return


def test_it_is_started_again_and_ends_with_the_server(started: Served) -> None:
    with ended(started.process):
        url, process = gateway_of(started)
        assert get(f"{url}/ready")["ready"] is True
        os.kill(process, signal.SIGKILL)
        wait_for_log(started, "gateway restart 1 of 1 in 0.5 s: the gateway ended with code -9")
        wait_healthy(url)  # at the same address
        process = gateway_process(started)
        assert started.stop(signal.SIGTERM) == EXIT_DONE
        wait_gone(process)


def test_it_is_given_up_when_it_ends_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_IMAGE_GATEWAY_STORE", str(tmp_path))
    has_ended = threading.Event()
    gateway = Gateway("127.0.0.1", 0, 5, RestartPolicy(max_restarts=0), has_ended.set, print)
    gateway.start("127.0.0.1:1")  # where no server is
    assert gateway.url is not None
    assert get(f"{gateway.url}/health") == {"status": "ok"}
    assert gateway._process is not None
    gateway._process.kill()
    assert has_ended.wait(END_TIMEOUT_SECONDS)
    reason = "the gateway ended with code -9; restarts in a row before: 0, as many as --max-restarts allows"
    assert str(gateway.failure) == reason
    gateway.stop()


def test_it_stops_when_its_standard_input_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "glm_image_gateway", "--port", "0", "--store", str(tmp_path), "--stop-at-eof"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: http://127.0.0.1:")
        process.communicate(timeout=END_TIMEOUT_SECONDS)
    assert process.returncode == 0


def test_refused_ports() -> None:
    GatewayFlags().check("127.0.0.1")
    with pytest.raises(ConfigurationError, match="--gateway is 70000; allowed: 0"):
        GatewayFlags(70000).check("127.0.0.1")

"""Faults of the host: a log that nobody reads, too few files, unusual paths, cleaned folders, operators' signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from server.served import Served, call, ended, write_model

# As the stages, it has a heartbeat, which ends when the model is unloaded.
MODEL = """
import json, os, sys
import numpy as np
import triton_python_backend_utils as pb_utils
from glm_image.telemetry.heartbeat import Heartbeat


class TritonPythonModel:
    def initialize(self, args):
        self.heartbeat = Heartbeat(args["model_instance_name"].removesuffix("_0"), 0)
        self.heartbeat.start()

    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.reply(request)]) for request in requests]

    def finalize(self):
        self.heartbeat.close()

    def reply(self, request):
        command = json.loads(pb_utils.get_input_tensor_by_name(request, "command").as_numpy()[0])
        reply = getattr(self, command["do"])(**command.get("with", {}))
        return pb_utils.Tensor("reply", np.array([json.dumps(reply).encode()], dtype=object))

    def log(self, lines):
        for number in range(lines):
            os.write(2, b"%07d" % number + b"x" * 992 + b"\\n")
        return lines
"""
LINES_IN_PIPES = 4000
"""Of 1 kB: more than all pipes and queues hold."""
STOP_SECONDS = 60


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model_index.json").write_text("{}")
    return tmp_path / "checkpoint"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_model(tmp_path / "models", "worker", MODEL)
    return tmp_path / "models"


def wait_stopped(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def test_server_works_and_stops_though_its_log_is_not_read(checkpoint: Path, repository: Path) -> None:
    readable, writable = os.pipe()
    served = Served(checkpoint, repository, stderr=writable)
    os.close(writable)
    with ended(served.process):
        served.wait_ready()
        assert call(served.http_url, "log", lines=LINES_IN_PIPES) == LINES_IN_PIPES
        os.kill(served.process.pid, signal.SIGSTOP)  # as Ctrl-Z
        wait_stopped(served.process.pid)
        for _ in range(2):
            assert call(served.http_url, "log", lines=LINES_IN_PIPES) == LINES_IN_PIPES
        served.process.send_signal(signal.SIGTERM)
        os.kill(served.process.pid, signal.SIGCONT)
        assert served.process.wait(STOP_SECONDS) == 0
        served.assert_gone()
    os.close(readable)

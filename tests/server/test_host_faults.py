"""Faults of the host: logs without a reader, few file descriptors, unusual paths, cleaned folders, signals."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc

from glm_image.supervisor.run_directory import PREFIX
from glm_image.watchdog.heartbeats import HeartbeatFile
from glm_image.watchdog.leftovers import SHARED_MEMORY
from glm_image.watchdog.watchdog import CHECK_SECONDS
from server.served import Served, call, descendants, ended, wait_gone, write_model

# As the stages, it has a heartbeat, which ends when the model is unloaded.
MODEL = """
import json, os, sys, time
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

    def paths(self):
        names = ("GLM_IMAGE_CHECKPOINT", "GLM_IMAGE_REQUEST_LOG", "TMPDIR", "WEIGHTS")
        return {**{name: os.environ[name] for name in names}, "model": os.path.dirname(os.path.dirname(__file__))}

    def wait_for_check(self, seconds):
        time.sleep(seconds)

    def log(self, lines):
        for number in range(lines):
            os.write(2, b"%07d" % number + b"x" * 992 + b"\\n")
        return lines
"""
IPV6 = "::1"
LINES_IN_PIPES = 4000
"""Of 1 kB: more than all pipes and queues hold."""
STOP_SECONDS = 60


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_model(tmp_path / "models", "worker", MODEL)
    return tmp_path / "models"


AWKWARD = "中文 a 'b' \"c\"\n$(d);e"
"""A name of all that shells, lists and encodings treat specially."""


def test_any_path_works_in_any_environment(tmp_path: Path) -> None:
    folder = tmp_path / AWKWARD
    (folder / "tmp").mkdir(parents=True)
    (folder / "ckpt").mkdir()
    (folder / "ckpt" / "model_index.json").write_text("{}")
    write_model(folder / "models", "worker", MODEL)
    environment = {
        "TMPDIR": str(folder / "tmp"), "XDG_RUNTIME_DIR": str(folder / "none"), "HOME": None, "LANG": None,
        "LC_ALL": "C", "WEIGHTS": str(folder / "ckpt"),
    }  # fmt: skip
    served = Served(
        folder / "ckpt", folder / "models", "--request-log", str(folder / "requests.jsonl"),
        environment=environment, umask=0o077,
    )  # fmt: skip
    with ended(served.process):
        served.wait_ready()
        paths = call(served.http_url, "paths")
        assert isinstance(paths, dict)
        assert all(path.isascii() for path in paths.values())
        for name, target in {
            "GLM_IMAGE_CHECKPOINT": folder / "ckpt",
            "TMPDIR": folder / "tmp",
            "WEIGHTS": folder / "ckpt",
            "model": folder / "models" / "worker",
        }.items():
            assert Path(paths[name]).samefile(target)
        assert Path(paths["GLM_IMAGE_REQUEST_LOG"]).resolve() == folder / "requests.jsonl"
        assert served.stop(signal.SIGTERM) == 0
        served.assert_gone()
    assert not list((folder / "tmp").iterdir())


@pytest.mark.full
@pytest.mark.parametrize("name", ["中文", "a b", "it's", 'a"b', "a\nb", "$(a);b"])
def test_each_path_alone_may_be_awkward(tmp_path: Path, name: str) -> None:
    for place in ("checkpoint", "models", "tmp", "logs"):
        case = tmp_path / place
        folders = {
            kind: case / (f"{kind} {name}" if kind == place else kind)
            for kind in ("checkpoint", "models", "tmp", "logs")
        }
        for folder in folders.values():
            folder.mkdir(parents=True)
        (folders["checkpoint"] / "model_index.json").write_text("{}")
        write_model(folders["models"], "worker", MODEL)
        log = folders["logs"] / "requests.jsonl"
        environment = {"TMPDIR": str(folders["tmp"]), "WEIGHTS": "none"}
        served = Served(folders["checkpoint"], folders["models"], "--request-log", str(log), environment=environment)
        with ended(served.process):
            served.wait_ready()
            paths = call(served.http_url, "paths")
            assert isinstance(paths, dict)
            assert Path(paths["GLM_IMAGE_CHECKPOINT"]).samefile(folders["checkpoint"])
            assert served.stop(signal.SIGTERM) == 0
            served.assert_gone()


IDLE_CONNECTIONS, USUAL_SOFT_LIMIT = 5000, 1024


@pytest.fixture
def many_descriptors() -> Iterator[int]:
    """Lets this process open many files; returns how many connections it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield min(IDLE_CONNECTIONS, hard - 2 * USUAL_SOFT_LIMIT) if hard != resource.RLIM_INFINITY else IDLE_CONNECTIONS
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limit_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (USUAL_SOFT_LIMIT, hard))


def test_idle_connections_keep_nobody_out(checkpoint: Path, repository: Path, many_descriptors: int) -> None:
    assert many_descriptors > USUAL_SOFT_LIMIT
    served = Served(checkpoint, repository, "--drain-seconds", "1", preexec_fn=limit_descriptors)
    with ended(served.process), contextlib.ExitStack() as idle:
        served.wait_ready()
        ports = listening_ports(served.triton)
        http_port = int(served.http_url.partition(":")[2])
        assert http_port in ports
        for number in range(many_descriptors):
            port = ports[number % len(ports)] if number % 10 == 0 else http_port
            connection = idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=STOP_SECONDS))
            if number % 2:
                connection.sendall(b"GET /v2/health/ready HTT")
        assert call(served.http_url, "log", lines=1) == 1
        grpc_url = served.ready_line.split()[2].removeprefix("grpc://")
        with contextlib.closing(tritonclient.grpc.InferenceServerClient(grpc_url)) as client:
            assert client.is_server_ready(client_timeout=STOP_SECONDS)
        (metrics_port,) = set(ports) - {http_port, int(grpc_url.partition(":")[2])}
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=STOP_SECONDS) as page:
            assert b"nv_inference_request_success" in page.read()
        assert len(list(Path(f"/proc/{served.triton}/fd").iterdir())) > many_descriptors
        assert served.stop(signal.SIGTERM) == 0
        served.assert_gone()
    assert "Too many open files" not in served.log.read_text()


def listening_ports(pid: int) -> list[int]:
    """Returns the TCP ports on which a process listens."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").rstrip("]"))
    tables = [Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return sorted({int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A" and line[9] in inodes})


def test_too_few_files_are_refused(checkpoint: Path, repository: Path) -> None:
    served = Served(checkpoint, repository, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    with ended(served.process):
        assert served.process.wait(STOP_SECONDS) == 2
    assert served.log.read_text() == (
        "error: the limit of open files is 64 (ulimit -Hn); allowed: 1024 or more, as every connection takes one\n"
    )


@pytest.fixture
def temporary_folder() -> Iterator[Path]:
    """A folder for run directories alone, with a short name."""
    folder = SHARED_MEMORY / f"glm-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def clean_up_old_files(folder: Path, rules: Path) -> None:
    """Runs systemd-tmpfiles over a folder all of whose files count as old, if this machine has it."""
    program = shutil.which("systemd-tmpfiles")
    if program is None:
        return
    (folder / "unlocked").touch()
    for path in folder.rglob("*"):
        os.utime(path, (0, 0), follow_symlinks=False)
    rules.write_text(f"d {folder} - - - m:1h\n")
    subprocess.run([program, "--clean", rules], check=True)
    assert not (folder / "unlocked").exists()


def test_cleaned_folder_and_killed_processes(
    checkpoint: Path, repository: Path, temporary_folder: Path, tmp_path: Path
) -> None:
    environment = {"TMPDIR": str(temporary_folder)}
    served = Served(checkpoint, repository, environment=environment)
    with ended(served.process):
        served.wait_ready()
        assert served.run_directory.parent == temporary_folder
        files = sorted(temporary_folder.rglob("*"))
        clean_up_old_files(temporary_folder, tmp_path / "rules.conf")
        assert sorted(temporary_folder.rglob("*")) == files
        for path in (served.run_directory / "heartbeats").iterdir():  # by a cleaner that ignores the lock
            path.unlink()
        assert call(served.http_url, "wait_for_check", seconds=CHECK_SECONDS + 0.5) is None
        os.kill(served.process.pid, signal.SIGSTOP)
        wait_stopped(served.process.pid)
        for pid in (served.watchdog, served.process.pid):
            os.kill(pid, signal.SIGKILL)
        for pid in served.family:
            wait_gone(pid)
    assert served.run_directory.exists()
    left = SHARED_MEMORY / f"glm_image_{served.run_directory.name.removeprefix(PREFIX)}_left"
    left.touch()  # as a process does that is killed at another moment
    again = Served(checkpoint, repository, environment=environment)
    with ended(again.process):
        again.wait_ready()
        served.assert_gone()
        assert not left.exists()
        assert again.stop(signal.SIGTERM) == 0
        again.assert_gone()
    assert not list(temporary_folder.iterdir())
    assert "the server is ended" not in served.log.read_text()


def repository_call(served: Served, action: str) -> None:
    url = f"http://{served.http_url}/v2/repository/models/worker/{action}"
    urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=STOP_SECONDS).close()


def test_operator_unloads_and_loads_over_ipv6_and_closes_the_terminal(checkpoint: Path, repository: Path) -> None:
    served = Served(checkpoint, repository, "--host", IPV6, "--open-apis", "model-repository")
    with ended(served.process):
        served.wait_ready()
        assert served.http_url.startswith("[::1]:")
        grpc_url = served.ready_line.split()[2].removeprefix("grpc://")
        with contextlib.closing(tritonclient.grpc.InferenceServerClient(grpc_url)) as client:
            assert client.is_server_ready(client_timeout=STOP_SECONDS)
        repository_call(served, "load")  # over the loaded one
        assert call(served.http_url, "log", lines=1) == 1
        repository_call(served, "unload")
        wait_gone(served.stub)
        repository_call(served, "load")
        assert call(served.http_url, "log", lines=1) == 1
        (stub,) = descendants(served.triton)
        assert stub != served.stub
        (heartbeat,) = (served.run_directory / "heartbeats").glob("*.heartbeat")
        assert HeartbeatFile(heartbeat).read().pid == stub
        assert served.stop(signal.SIGHUP) == 0
        served.assert_gone()
    log = served.log.read_text()
    assert "the server is ended" not in log
    assert "restart 1 of" not in log


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

"""A server whose processes die, are stopped or hang: it ends the open requests, and restarts or gives up."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from glm_image.request.stages import Stage
from glm_image.supervisor import ServerSettings, TritonServer
from helpers import wait_until
from server.kserve import KServeError, Values, grpc_infer
from server.served import HeldRequest, Served, call, ended, wait_for_log, write_model
from server.test_metrics import page_when

HANG_SECONDS = 3
READY_SECONDS = 60
REQUEST: Values = {"prompt": "a fox", "height": 768, "width": 768, "num_inference_steps": 1, "seed": 3}

# Holds requests as the stages do: execute has returned, and the response is sent later.
MODEL = """
import ctypes, json, os, signal, threading
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils
from glm_image.telemetry.heartbeat import Heartbeat


class TritonPythonModel:
    def initialize(self, args):
        if Path(__file__).with_name("broken").exists():
            raise ValueError("it is broken now")
        self.heartbeat = Heartbeat("worker_0", HANG_SECONDS)
        self.alive = True
        self.heartbeat.start(lambda: self.alive)

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.reply, args=(request, request.get_response_sender()), daemon=True).start()

    def reply(self, request, sender):
        command = json.loads(pb_utils.get_input_tensor_by_name(request, "command").as_numpy()[0])
        reply = getattr(self, command["do"])(**command.get("with", {}))
        tensor = pb_utils.Tensor("reply", np.array([json.dumps(reply).encode()], dtype=object))
        sender.send(pb_utils.InferenceResponse([tensor]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def restarts(self):
        return os.environ["GLM_IMAGE_RESTARTS"]

    def hold(self, entered, go):
        Path(entered).write_text("entered")
        return Path(go).read_text()

    def one_long_command(self):
        self.heartbeat.watched(lambda _: signal.sigtimedwait([], 3600))(None)

    def hold_interpreter_lock(self):
        ctypes.PyDLL(None).sleep(3600)

    def stop_engine(self):
        self.alive = False
        threading.Event().wait()

    def finalize(self):
        self.heartbeat.close()
""".replace("HANG_SECONDS", str(HANG_SECONDS))


@contextlib.contextmanager
def started(checkpoint: Path, folder: Path, max_restarts: int = 2) -> Iterator[Served]:
    write_model(folder / "models", "worker", MODEL)
    served = Served(checkpoint, folder / "models", "--max-restarts", str(max_restarts))
    with ended(served.process):
        served.wait_ready()
        yield served


def is_ready(url: str) -> bool:
    with contextlib.closing(http.client.HTTPConnection(url, timeout=READY_SECONDS)) as connection:
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (ConnectionError, http.client.HTTPException):
            return False


def wait_until_unready(url: str) -> None:
    assert wait_until(lambda: not is_ready(url))


def assert_restarted(served: Served, restarts: int) -> None:
    url, family = served.http_url, served.family
    served.wait_ready()
    assert served.http_url == url
    assert not set(family) & set(served.family[1:])
    assert call(url, "restarts") == str(restarts)


@pytest.mark.parametrize("victim", ["stub", pytest.param("triton", marks=pytest.mark.full)])
def test_killed_process_ends_requests_and_server_restarts(checkpoint: Path, tmp_path: Path, victim: str) -> None:
    with started(checkpoint, tmp_path) as served:
        held = HeldRequest(served.http_url, tmp_path)
        os.kill(getattr(served, victim), signal.SIGKILL)
        wait_until_unready(served.http_url)
        assert isinstance(held.wait(), OSError)  # the connection is closed
        killed = f"worker_0 (process {served.stub}) was killed by SIGKILL"  # noticed by its end, not by its heartbeat
        reason = {"stub": killed, "triton": "tritonserver ended by itself, by SIGKILL"}[victim]
        assert_restarted(served, 1)
        assert f"restart 1 of 2 in 0.5 s: {reason}" in served.log.read_text()
        assert served.stop(signal.SIGTERM) == 0
        served.assert_gone()


def stop(served: Served) -> None:
    os.kill(served.stub, signal.SIGSTOP)


def in_model(do: str) -> Callable[[Served], None]:
    def run(served: Served) -> None:
        with contextlib.suppress(OSError):
            call(served.http_url, do)

    return run


HANGS: dict[str, tuple[Callable[[Served], None], str]] = {
    "stopped": (stop, "has been stopped for seconds"),
    "in_one_command": (in_model("one_long_command"), f"more than hang_seconds ({HANG_SECONDS})"),
    "interpreter_lock_held": (in_model("hold_interpreter_lock"), "hangs: it has shown no sign of life"),
    "engine_stopped": (in_model("stop_engine"), "hangs: it has shown no sign of life"),
}


@pytest.mark.full
def test_hanging_process_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    """All cases concurrently: they mostly wait."""

    def hang(name: str) -> None:
        hang_process, reason = HANGS[name]
        with started(checkpoint, tmp_path / name) as served:
            thread = threading.Thread(target=hang_process, args=(served,))
            thread.start()
            wait_until_unready(served.http_url)
            thread.join(READY_SECONDS)
            assert not thread.is_alive()  # the caller's connection was closed
            assert_restarted(served, 1)
            assert reason in served.log.read_text()
            assert served.stop(signal.SIGTERM) == 0
            served.assert_gone()

    with ThreadPoolExecutor(len(HANGS)) as pool:
        list(pool.map(hang, HANGS))


def test_crash_loop_ends_the_supervisor(checkpoint: Path, tmp_path: Path) -> None:
    with started(checkpoint, tmp_path) as served:
        (tmp_path / "models" / "worker" / "1" / "broken").touch()
        os.kill(served.stub, signal.SIGKILL)
        assert served.process.wait(READY_SECONDS) == 3
        served.assert_gone()
    log = served.log.read_text()
    assert "restart 1 of 2 in 0.5 s: worker_0 (process" in log
    assert "restart 2 of 2 in 1 s: worker failed to load: ValueError: it is broken now" in log
    assert log.splitlines()[-1] == (
        "error: worker failed to load: ValueError: it is broken now; "
        "restarts in a row before: 2, as many as --max-restarts allows"
    )


def test_stop_between_restarts(checkpoint: Path, tmp_path: Path) -> None:
    """More restarts are allowed than there is time for before the stop."""
    with started(checkpoint, tmp_path, max_restarts=50) as served:
        (tmp_path / "models" / "worker" / "1" / "broken").touch()
        os.kill(served.stub, signal.SIGKILL)
        wait_for_log(served, "restart 2 of 50 in 1 s")
        assert served.stop(signal.SIGTERM) == 0
        served.assert_gone()


@pytest.mark.full
def test_drain_finishes_both_stages_of_a_request(tiny_checkpoint: Path, same_threads: None, tmp_path: Path) -> None:
    """A request in the first stage at the stop is completed by the second."""
    with TritonServer(
        ServerSettings(tiny_checkpoint, drain_seconds=60, request_log=tmp_path / "requests.jsonl")
    ) as server:
        expected = grpc_infer(server, REQUEST)["images"]
        with pytest.raises(KServeError):
            grpc_infer(server, {**REQUEST, "height": 0})
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(grpc_infer, server, REQUEST)
            page_when(server, lambda page: page["ar_running_sequences"] > 0)
            server.request_stop()
            wait_until_unready(server.http_url)
            with pytest.raises((KServeError, OSError)):
                grpc_infer(server, REQUEST)
            np.testing.assert_array_equal(reply.result()["images"], expected)
        assert server.wait() == 0
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["ok", "INVALID_ARG", "ok"]
    assert REQUEST.items() - {("prompt", REQUEST["prompt"]), ("num_inference_steps", 1)} <= lines[2].items()
    assert set(lines[2]["seconds"]) == set(Stage)
    assert "a fox" not in (tmp_path / "requests.jsonl").read_text()


@pytest.mark.full
def test_drain_finishes_a_direct_request_to_a_stage(tiny_checkpoint: Path, same_threads: None) -> None:
    """The stage is unloaded meanwhile, as is the stage that does the unloading."""
    paint_request: Values = {"prompt": "a fox", "num_inference_steps": 20}
    with TritonServer(ServerSettings(tiny_checkpoint, drain_seconds=60)) as server:
        prior = grpc_infer(server, REQUEST, "glm_ar")
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(grpc_infer, server, {**paint_request, **prior}, "glm_dit")
            page_when(server, lambda page: page["dit_step_seconds_count"] > 0)
            server.request_stop()
            assert reply.result()["images"].shape == (1, REQUEST["height"], REQUEST["width"], 3)
        assert server.wait() == 0

"""A server whose processes die, are stopped or hang: it is not ready, tells everybody, and comes back or gives up."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from glm_image.request.stages import Stage
from glm_image.supervisor import TritonServer
from server.kserve import KServeError, Values, grpc_infer
from server.served import HeldRequest, Served, ask, ended, wait_for_log, write_model
from server.test_metrics import page_when

KILLED_SECONDS, HUNG_SECONDS = 2, 10
HANG_SECONDS = 3
READY_SECONDS = 60
PICTURE: Values = {"prompt": "a fox", "height": 768, "width": 768, "num_inference_steps": 1, "seed": 3}

# Holds requests as the stages do: execute has returned, and the answer goes out later.
MODEL = """
import ctypes, json, os, signal, threading
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils
from glm_image.serving.pulse import Pulse


class TritonPythonModel:
    def initialize(self, args):
        if Path(__file__).with_name("broken").exists():
            raise ValueError("it is broken now")
        self.pulse = Pulse("worker_0", HANG_SECONDS)
        self.alive = True
        self.pulse.start(lambda: self.alive)

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request, request.get_response_sender()), daemon=True).start()

    def answer(self, request, sender):
        order = json.loads(pb_utils.get_input_tensor_by_name(request, "order").as_numpy()[0])
        answer = getattr(self, order["do"])(**order.get("with", {}))
        tensor = pb_utils.Tensor("answer", np.array([json.dumps(answer).encode()], dtype=object))
        sender.send(pb_utils.InferenceResponse([tensor]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def tell(self):
        return os.environ["GLM_IMAGE_RESTARTS"]

    def hold(self, entered, go):
        Path(entered).write_text("entered")
        return Path(go).read_text()

    def one_long_command(self):
        self.pulse.watched(lambda _: signal.sigtimedwait([], 3600))(None)

    def never_let_go(self):
        ctypes.PyDLL(None).sleep(3600)

    def lose_the_engine(self):
        self.alive = False
        threading.Event().wait()

    def finalize(self):
        self.pulse.close()
""".replace("HANG_SECONDS", str(HANG_SECONDS))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model_index.json").write_text("{}")
    return tmp_path / "checkpoint"


@contextlib.contextmanager
def started(checkpoint: Path, folder: Path) -> Iterator[Served]:
    write_model(folder / "models", "worker", MODEL)
    served = Served(checkpoint, folder / "models", "--max-restarts", "2")
    with ended(served.process):
        served.wait_ready()
        yield served


def is_ready(url: str) -> bool:
    with contextlib.closing(http.client.HTTPConnection(url, timeout=1)) as connection:
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False


def seconds_until_unready(url: str) -> float:
    began = time.monotonic()
    while is_ready(url):
        assert time.monotonic() - began < READY_SECONDS
    return time.monotonic() - began


def assert_comes_back(served: Served, restarts: int) -> None:
    url, family = served.http_url, served.family
    served.wait_ready()
    assert served.http_url == url
    assert not set(family) & set(served.family[1:])
    assert ask(url, "tell") == str(restarts)


@pytest.mark.parametrize("victim", ["stub", pytest.param("triton", marks=pytest.mark.full)])
def test_a_killed_process(checkpoint: Path, tmp_path: Path, victim: str) -> None:
    with started(checkpoint, tmp_path) as served:
        held = HeldRequest(served.http_url, tmp_path)
        os.kill(getattr(served, victim), signal.SIGKILL)
        assert seconds_until_unready(served.http_url) < KILLED_SECONDS
        assert isinstance(held.wait(), OSError)  # told at once, by a connection that is closed
        assert_comes_back(served, 1)
        name = {"stub": "worker_0 (process", "triton": "tritonserver ended by itself, by SIGKILL"}[victim]
        assert f"restart 1 of 2 in 0.5 s: {name}" in served.log.read_text()
        assert served.stop(signal.SIGTERM) == 0
        served.assert_gone()


def stop(served: Served) -> None:
    os.kill(served.stub, signal.SIGSTOP)


def order(do: str) -> Callable[[Served], None]:
    def give(served: Served) -> None:
        with contextlib.suppress(OSError):
            ask(served.http_url, do)

    return give


HANGS: dict[str, tuple[Callable[[Served], None], str]] = {
    "stopped": (stop, "has been stopped for seconds"),
    "in_one_command": (order("one_long_command"), f"more than hang_seconds ({HANG_SECONDS})"),
    "interpreter_not_let_go": (order("never_let_go"), "hangs: it has shown no sign of life"),
    "no_engine": (order("lose_the_engine"), "hangs: it has shown no sign of life"),
}


@pytest.mark.full
def test_processes_that_hang(checkpoint: Path, tmp_path: Path) -> None:
    """Side by side: most of the time passes in waiting."""

    def hang(name: str) -> float:
        bring_about, told = HANGS[name]
        with started(checkpoint, tmp_path / name) as served:
            thread = threading.Thread(target=bring_about, args=(served,))
            thread.start()
            seconds = seconds_until_unready(served.http_url)
            thread.join(READY_SECONDS)
            assert not thread.is_alive()  # whoever asked has been told
            assert_comes_back(served, 1)
            assert told in served.log.read_text()
            assert served.stop(signal.SIGTERM) == 0
            served.assert_gone()
            return seconds

    with ThreadPoolExecutor(len(HANGS)) as pool:
        for seconds in pool.map(hang, HANGS):
            assert seconds < HUNG_SECONDS


def test_a_crash_loop_ends(checkpoint: Path, tmp_path: Path) -> None:
    with started(checkpoint, tmp_path) as served:
        (tmp_path / "models" / "worker" / "1" / "broken").touch()
        os.kill(served.stub, signal.SIGKILL)
        assert served.process.wait(READY_SECONDS) == 3
        served.assert_gone()
    told = served.log.read_text()
    assert "restart 1 of 2 in 0.5 s: worker_0 (process" in told
    assert "restart 2 of 2 in 1 s: worker failed to load: ValueError: it is broken now" in told
    assert told.splitlines()[-1] == (
        "error: worker failed to load: ValueError: it is broken now; "
        "restarts in a row before: 2, as many as --max-restarts allows"
    )


def test_a_stop_between_restarts(checkpoint: Path, tmp_path: Path) -> None:
    with started(checkpoint, tmp_path) as served:
        (tmp_path / "models" / "worker" / "1" / "broken").touch()
        os.kill(served.stub, signal.SIGKILL)
        wait_for_log(served, "restart 2 of 2 in 1 s")
        assert served.stop(signal.SIGTERM) == 0
        served.assert_gone()


@pytest.mark.full
def test_a_drained_server_finishes_both_stages(tiny_checkpoint: Path, same_threads: None, tmp_path: Path) -> None:
    """A request that is in the first stage when the server is asked to end still becomes a picture."""
    with TritonServer(tiny_checkpoint, drain_seconds=60, request_log=tmp_path / "requests.jsonl") as server:
        expected = grpc_infer(server, PICTURE)["images"]
        with pytest.raises(KServeError):
            grpc_infer(server, {**PICTURE, "height": 0})
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(grpc_infer, server, PICTURE)
            page_when(server, lambda page: page["ar_running_sequences"] > 0)
            server.request_stop()
            assert seconds_until_unready(server.http_url) < KILLED_SECONDS
            with pytest.raises((KServeError, OSError)):
                grpc_infer(server, PICTURE)
            np.testing.assert_array_equal(answer.result()["images"], expected)
        assert server.wait() == 0
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["ok", "INVALID_ARG", "ok"]
    assert PICTURE.items() - {("prompt", PICTURE["prompt"]), ("num_inference_steps", 1)} <= lines[2].items()
    assert set(lines[2]["seconds"]) == set(Stage)
    assert "a fox" not in (tmp_path / "requests.jsonl").read_text()


@pytest.mark.full
def test_a_drained_server_finishes_what_a_stage_was_asked_directly(tiny_checkpoint: Path, same_threads: None) -> None:
    """It is unloaded meanwhile, and so is the stage that does the unloading."""
    asked: Values = {"prompt": "a fox", "num_inference_steps": 20}
    with TritonServer(tiny_checkpoint, drain_seconds=60) as server:
        prior = grpc_infer(server, PICTURE, "glm_ar")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(grpc_infer, server, {**asked, **prior}, "glm_dit")
            page_when(server, lambda page: page["dit_step_seconds_count"] > 0)
            server.request_stop()
            assert answer.result()["images"].shape == (1, PICTURE["height"], PICTURE["width"], 3)
        assert server.wait() == 0

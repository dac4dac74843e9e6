"""Both stages over two devices each, here CPU "cards": the same picture, and what happens when a rank is lost."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from glm_image.supervisor import ServerSettings, TritonServer
from glm_image.supervisor.restarts import RestartPolicy, keep_running
from glm_image_client import GlmImageClient
from server.kserve import KServeError, Values, at_once, grpc_infer
from server.served import descendants, wait_gone
from server.test_placement import copy_repository, set_parameter

READY_SECONDS = 120
SOON_SECONDS = 10.0
HANG_SECONDS = 6.0
POLICY = RestartPolicy(max_restarts=4)
ASKED: Values = {"prompt": "a fox reading 'NEWS'", "height": 96, "width": 160, "num_inference_steps": 3, "seed": 1}


def _repository(folder: Path, hang_seconds: float | None = None) -> Path:
    repository = copy_repository(folder / "models", "glm_image", "glm_ar", "glm_dit", "glm_control")
    set_parameter(repository, "glm_ar", "devices", "cpu:0,cpu:1")
    set_parameter(repository, "glm_dit", "devices", "cpu:2,cpu:3")
    set_parameter(repository, "glm_dit", "parallel", "cfg=2")
    if hang_seconds is not None:
        for model in ("glm_ar", "glm_dit"):
            set_parameter(repository, model, "hang_seconds", str(hang_seconds))
    return repository


@contextmanager
def _kept(server: TritonServer, ready: threading.Semaphore) -> Iterator[None]:
    keeper = threading.Thread(target=keep_running, args=(server, POLICY, ready.release, print))
    keeper.start()
    try:
        assert ready.acquire(timeout=READY_SECONDS), server.log_tail
        yield
    finally:
        server.request_stop()
        keeper.join()


def _workers() -> dict[str, int]:
    """Returns the ranks' processes, by the stage they serve."""
    found = {}
    for pid in descendants(os.getpid()):
        if b"glm_image.parallel.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            stage = re.search(rb"glm_ar|glm_dit", Path(f"/proc/{parent}/cmdline").read_bytes())
            assert stage is not None
            found[stage[0].decode()] = pid
    return found


# What is done to rank 1, how long it then takes to be noticed at the most, and what is said of it.
LOSSES = {
    "killed": (signal.SIGKILL, 0.0, "was ended by signal 9"),
    "stopped": (signal.SIGSTOP, HANG_SECONDS, f"has not finished a command for {HANG_SECONDS:g} s"),
}


def _lose_rank(server: TritonServer, stage: str, doing: str, kind: signal.Signals, lost: list[float]) -> None:
    """Sends rank 1 of a stage a signal when a request is at that."""
    with GlmImageClient(server.grpc_url) as client:
        while [one["stage"] for one in client.status("lost")["requests"]] != [doing]:
            pass
    os.kill(_workers()[stage], kind)
    lost.append(time.monotonic())


@pytest.mark.full
@pytest.mark.parametrize("loss", LOSSES)
def test_a_rank_that_is_lost_under_a_request(
    triton: TritonServer, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kind, notice_seconds, told = LOSSES[loss]
    alone = grpc_infer(triton, ASKED)["images"].astype(int)
    log, ready = io.StringIO(), threading.Semaphore(0)
    repository = _repository(tmp_path, HANG_SECONDS)
    server = TritonServer(ServerSettings(tiny_checkpoint, model_repository=repository, drain_seconds=5), log=log)
    with _kept(server, ready):
        seen = set(_workers().values())
        for stage, doing in (("glm_ar", "decode"), ("glm_dit", "denoise")):
            together = grpc_infer(server, ASKED)["images"].astype(int)
            assert np.abs(together - alone).max() <= 1
            long = (
                {**ASKED, "height": 1024, "width": 1024} if stage == "glm_ar" else {**ASKED, "num_inference_steps": 200}
            )
            lost: list[float] = []
            losing = threading.Thread(target=_lose_rank, args=(server, stage, doing, kind, lost))
            losing.start()
            with pytest.raises(KServeError) as refusal:
                grpc_infer(server, long, request_id="lost")
            answered = time.monotonic()
            losing.join()
            assert answered - lost[0] < notice_seconds + SOON_SECONDS
            assert refusal.value.status == "UNAVAILABLE"
            assert ready.acquire(timeout=READY_SECONDS), server.log_tail
            seen |= set(_workers().values())
        assert np.abs(grpc_infer(server, ASKED)["images"].astype(int) - alone).max() <= 1
    for pid in seen:
        wait_gone(pid)
    for device in ("cpu:1", "cpu:3"):
        assert re.search(rf"rank 1 \({device}, pid \d+\) {told}", log.getvalue())


@pytest.mark.full
def test_pictures_of_stages_over_two_devices(
    triton: TritonServer, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = grpc_infer(triton, ASKED)["images"].astype(int)
    with TritonServer(
        ServerSettings(tiny_checkpoint, model_repository=_repository(tmp_path), drain_seconds=5)
    ) as server:
        workers = _workers()
        assert set(workers) == {"glm_ar", "glm_dit"}
        # At once, so that commands for several requests reach the ranks between each other.
        burst = at_once([partial(grpc_infer, server, ASKED) for _ in range(3)])
        for outputs in burst.outputs:
            assert np.abs(outputs["images"].astype(int) - alone).max() <= 1
    for pid in workers.values():
        wait_gone(pid)

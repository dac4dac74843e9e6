"""Both stages over two devices each, here CPU devices: equal images, and recovery from a lost rank."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from glm_image.supervisor import ServerSettings, TritonServer
from glm_image.supervisor.restarts import RestartPolicy, keep_running
from glm_image_client import GlmImageClient
from helpers import wait_until
from server.kserve import KServeError, Values, at_once, grpc_infer
from server.served import descendants, wait_gone
from server.test_placement import copy_repository, set_parameter

READY_SECONDS = 120
HANG_SECONDS = 6.0
POLICY = RestartPolicy(max_restarts=4)
REQUEST: Values = {"prompt": "a fox reading 'NEWS'", "height": 96, "width": 160, "num_inference_steps": 3, "seed": 1}


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
    """Returns the worker processes by their model."""
    found = {}
    for pid in descendants(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if b"glm_image.parallel.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                stage = re.search(rb"glm_ar|glm_dit", Path(f"/proc/{parent}/cmdline").read_bytes())
                assert stage is not None
                found[stage[0].decode()] = pid
    return found


# The signal to rank 1, and the reported reason.
LOSSES = {
    "killed": (signal.SIGKILL, "was ended by signal 9"),
    "stopped": (signal.SIGSTOP, f"has not finished a command for {HANG_SECONDS:g} s"),
}


def _lose_rank(server: TritonServer, stage: str, phase: str, kind: signal.Signals) -> None:
    """Sends a signal to rank 1 of a stage when the request reaches a phase."""
    with GlmImageClient(server.grpc_url) as client:
        assert wait_until(lambda: [request["stage"] for request in client.status("lost")["requests"]] == [phase])
    os.kill(_workers()[stage], kind)


@pytest.mark.full
@pytest.mark.parametrize("loss", LOSSES)
def test_lost_rank_ends_the_request_and_the_server_restarts(
    triton: TritonServer, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kind, reason = LOSSES[loss]
    alone = grpc_infer(triton, REQUEST)["images"].astype(int)
    log, ready = io.StringIO(), threading.Semaphore(0)
    repository = _repository(tmp_path, HANG_SECONDS)
    server = TritonServer(ServerSettings(tiny_checkpoint, model_repository=repository, drain_seconds=5), log=log)
    with _kept(server, ready):
        seen = set(_workers().values())
        for stage, phase in (("glm_ar", "decode"), ("glm_dit", "denoise")):
            together = grpc_infer(server, REQUEST)["images"].astype(int)
            assert np.abs(together - alone).max() <= 1
            long = (
                {**REQUEST, "height": 1024, "width": 1024}
                if stage == "glm_ar"
                else {**REQUEST, "num_inference_steps": 200}
            )
            losing = threading.Thread(target=_lose_rank, args=(server, stage, phase, kind))
            losing.start()
            with pytest.raises(KServeError) as refusal:
                grpc_infer(server, long, request_id="lost")
            losing.join()
            assert refusal.value.status == "UNAVAILABLE"
            assert ready.acquire(timeout=READY_SECONDS), server.log_tail
            seen |= set(_workers().values())
        assert np.abs(grpc_infer(server, REQUEST)["images"].astype(int) - alone).max() <= 1
    for pid in seen:
        wait_gone(pid)
    for device in ("cpu:1", "cpu:3"):
        assert re.search(rf"rank 1 \({device}, pid \d+\) {reason}", log.getvalue())


@pytest.mark.full
def test_images_of_stages_over_two_devices_are_equal(
    triton: TritonServer, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = grpc_infer(triton, REQUEST)["images"].astype(int)
    with TritonServer(
        ServerSettings(tiny_checkpoint, model_repository=_repository(tmp_path), drain_seconds=5)
    ) as server:
        workers = _workers()
        assert set(workers) == {"glm_ar", "glm_dit"}
        # Concurrently, so that commands of several requests interleave on the ranks.
        burst = at_once([partial(grpc_infer, server, REQUEST) for _ in range(3)])
        for outputs in burst.outputs:
            assert np.abs(outputs["images"].astype(int) - alone).max() <= 1
    for pid in workers.values():
        wait_gone(pid)

"""An instance on several devices equals one on one device, and handles the loss of a rank."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from numpy.typing import NDArray

import failing_ranks
from glm_image.ar.engine import ArEngine, ArResult
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.errors import ConfigurationError, UnavailableError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.rank_group import WorkerConfig, start_ranks
from glm_image.parallel.worker import Load
from glm_image.pipeline import LocalPipeline, paint_request
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, PaintRequest
from glm_image.watchdog.processes import children_of
from pictures import encoded, picture

WAIT_SECONDS = 60
HANG_SECONDS = 3.0

# Tokens that do not divide by the ranks, branches with texts of other lengths, no guidance, sources of other sizes.
REQUESTS = {
    "text": GenerationParameters(
        prompt="a fox 'NEWS' and “ok”", height=160, width=96, seed=1, num_inference_steps=3, guidance_scale=4.0
    ),
    "few tokens": GenerationParameters(
        prompt="'A'", height=32, width=32, seed=4, num_inference_steps=2, guidance_scale=2.0
    ),
    "no guidance": GenerationParameters(
        prompt="no quotes", height=96, width=96, seed=2, num_inference_steps=2, guidance_scale=1.0
    ),
    "two sources": GenerationParameters(
        prompt="make it 'red'",
        images=[encoded(picture(96, 128)), encoded(picture(70, 70))],
        height=128,
        width=96,
        seed=3,
        num_inference_steps=3,
        guidance_scale=2.0,
    ),
}
FEW = ["cfg=2", "ulysses=2", "tp=2"]
MANY = [
    "ring=2",
    "cfg=2,ulysses=2",
    "ring=2,ulysses=2",
    "cfg=2,tp=2",
    "tp=2,ulysses=2",
    "cfg=2,ring=2",
    "tp=4",
    "ulysses=4",
    "ring=4",
]


def _paint(
    checkpoint: Path, parallel: str, ranks: int, requests: dict[str, PaintRequest]
) -> dict[str, NDArray[np.int64]]:
    settings, workers = DitSettings(parallel=parallel), WorkerConfig(("cpu",) * (ranks - 1))
    engine = DitEngine(Checkpoint.open(checkpoint), open_device("cpu"), settings, workers=workers)
    try:
        assert engine.attention_backend == ("_native_flash" if "ring" in parallel else "native")
        return {
            name: engine.paint(RequestContext(), request, Limits()).result(WAIT_SECONDS).pixels.astype(np.int64)
            for name, request in requests.items()
        }
    finally:
        engine.close()


@pytest.fixture(scope="module")
def paint_requests(pipeline: LocalPipeline) -> dict[str, PaintRequest]:
    """What the AR, which is on one device in any layout, hands to the DiT."""
    resolved = {name: pipeline.resolve(request) for name, request in REQUESTS.items()}
    return {name: paint_request(request, pipeline.prior(request), {}) for name, request in resolved.items()}


@pytest.fixture(scope="module")
def alone(checkpoint_folder: Path, paint_requests: dict[str, PaintRequest]) -> dict[str, NDArray[np.int64]]:
    return _paint(checkpoint_folder, "auto", 1, paint_requests)


@pytest.mark.parametrize("parallel", [*FEW, *(pytest.param(layout, marks=pytest.mark.full) for layout in MANY)])
def test_images_equal_those_of_one_device(
    checkpoint_folder: Path,
    paint_requests: dict[str, PaintRequest],
    alone: dict[str, NDArray[np.int64]],
    parallel: str,
) -> None:
    ranks = math.prod(int(ways) for ways in re.findall(r"\d", parallel))
    together = _paint(checkpoint_folder, parallel, ranks, paint_requests)
    differences = {name: int(np.abs(together[name] - alone[name]).max()) for name in alone}
    assert max(differences.values()) <= 1, differences


@contextmanager
def _decoder(checkpoint: Path, workers: WorkerConfig) -> Iterator[ArEngine]:
    settings = ArSettings(max_sequence_tokens=2048)  # that of ``pipeline``
    engine = ArEngine(Checkpoint.open(checkpoint), open_device("cpu"), settings, workers=workers)
    try:
        yield engine
    finally:
        engine.close()


DECODED = GenerationParameters(prompt="a red fox 'NEWS'", height=256, width=256, seed=5)
LONG = replace(DECODED, height=1024, width=1024)


def _decode(
    engine: ArEngine, context: RequestContext | None = None, parameters: GenerationParameters = DECODED
) -> Future[ArResult]:
    return engine.submit(context or RequestContext(), parameters.resolve(Limits(), engine.sampling))


@pytest.fixture(scope="module")
def tokens(pipeline: LocalPipeline) -> NDArray[np.int32]:
    """Of one device."""
    return pipeline.prior(pipeline.resolve(DECODED)).prior_token_ids


@pytest.mark.full
def test_tokens_of_four_devices_equal_those_of_one(checkpoint_folder: Path, tokens: NDArray[np.int32]) -> None:
    with _decoder(checkpoint_folder, WorkerConfig(("cpu",) * 3)) as engine:
        np.testing.assert_array_equal(_decode(engine).result(WAIT_SECONDS).prior_token_ids, tokens)


class _Loss:
    """Records the loss of a rank."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.errors: list[UnavailableError] = []

    def __call__(self, error: UnavailableError) -> None:
        self.errors.append(error)
        self.called.set()


def worker_pids(pid: int) -> list[int]:
    return [child for child in children_of(pid) if "glm_image.parallel.worker" in _command_of(child)]


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return ""


# By the signal to rank 1: the reported reason.
LOSSES = {
    signal.SIGKILL: "was ended by signal 9",
    signal.SIGSTOP: f"has not finished a command for {HANG_SECONDS:g} s",
}


@pytest.mark.parametrize("kind", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.full)])
def test_tokens_equal_those_of_one_device_and_a_lost_rank_ends_the_requests_with_an_error(
    checkpoint_folder: Path, tokens: NDArray[np.int32], kind: signal.Signals
) -> None:
    loss, decoding = _Loss(), threading.Event()

    def progress(_: Progress) -> None:
        decoding.set()

    # A killed rank is noticed immediately; a short limit could only misjudge a slow machine.
    hang_seconds = WAIT_SECONDS if kind == signal.SIGKILL else HANG_SECONDS
    with _decoder(checkpoint_folder, WorkerConfig(("cpu",), hang_seconds=hang_seconds, on_loss=loss)) as engine:
        np.testing.assert_array_equal(_decode(engine).result(WAIT_SECONDS).prior_token_ids, tokens)
        (worker,) = worker_pids(os.getpid())
        running = _decode(engine, RequestContext(observers=(ProgressCallback(progress),)), LONG)
        assert decoding.wait(WAIT_SECONDS)
        os.kill(worker, kind)
        with pytest.raises(
            UnavailableError, match=f"rank 1 .cpu, pid {worker}. {LOSSES[kind]}.*send the request again"
        ):
            running.result(WAIT_SECONDS)
        assert loss.called.wait(WAIT_SECONDS)
        assert len(loss.errors) == 1
        with pytest.raises(UnavailableError, match="rank 1"):
            _decode(engine).result(WAIT_SECONDS)
    assert not worker_pids(os.getpid())


def _worker_config(failing: Load) -> WorkerConfig:
    return WorkerConfig(("cpu",), load_seconds=HANG_SECONDS if failing is failing_ranks.hangs else WAIT_SECONDS)


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "failing", "reason"),
    [
        ((failing_ranks.EndsWhenRead(),), failing_ranks.meets, r"rank 1 .cpu, pid \d+. was ended by signal 9"),
        ((failing_ranks.HidesTheNetwork(),), failing_ranks.meets, r"rank 1 .cpu, pid \d+. ended with .*no\.such\.net"),
        ((), failing_ranks.ends, r"rank 1 .cpu, pid \d+. was ended by signal 9"),
        ((), failing_ranks.fails, r"rank 1 .cpu, pid \d+. ended with ValueError: this rank cannot load"),
        ((), failing_ranks.hangs, r"3 s after the start rank 0, this process, has not .* and rank 1 .* has not "),
    ],
    ids=["killed at its start", "no rendezvous", "killed while others wait", "error while others wait", "hung"],
)
def test_rank_lost_while_loading_ends_the_load(arguments: tuple[Any, ...], failing: Load, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{reason}.*; the instance cannot be loaded"):
        start_ranks(failing, arguments, open_device("cpu"), ParallelLayout(tp=2), _worker_config(failing))
    assert not worker_pids(os.getpid())


def test_rank_without_its_device_is_reported_and_leaves_no_process() -> None:
    with pytest.raises(ConfigurationError, match=r"rank 1 .npu:7.*found on this machine"):
        start_ranks(failing_ranks.meets, (None,), open_device("cpu"), ParallelLayout(tp=2), WorkerConfig(("npu:7",)))
    assert not worker_pids(os.getpid())


def test_close_ends_rank_0_first_and_the_workers_despite_its_error() -> None:
    group = start_ranks(failing_ranks.ends_badly, (), open_device("cpu"), ParallelLayout(tp=2), WorkerConfig(("cpu",)))
    group.run("anything")
    failing_ranks.ENDS.clear()
    group.close()
    assert failing_ranks.ENDS == [2.0]
    assert not dist.is_initialized()
    assert not worker_pids(os.getpid())


ORPHANS = """
import sys
from pathlib import Path
from glm_image.parallel.layout import ParallelLayout
from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.parallel.rank_group import WorkerConfig
engine = ArEngine(Checkpoint.open(Path(sys.argv[1])), open_device("cpu"), ArSettings(), workers=WorkerConfig(("cpu",)))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.full
def test_killing_rank_0_leaves_no_orphans(checkpoint_folder: Path) -> None:
    command = [sys.executable, "-c", ORPHANS, str(checkpoint_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline().strip() == "ready"
        (worker,) = worker_pids(first.pid)
        ended = os.pidfd_open(worker)
        first.kill()
    try:
        assert select.select([ended], [], [], WAIT_SECONDS)[0], "the worker is still running"
    finally:
        os.close(ended)


def test_layout_of_another_size_is_refused_before_any_start(checkpoint_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="takes 4 devices, and the instance has 2"):
        _paint(checkpoint_folder, "cfg=2,ulysses=2", 2, {})

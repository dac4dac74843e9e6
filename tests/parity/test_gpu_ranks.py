"""Instances on several GPUs: images as exact as those of one GPU, the same tokens, and the loss of a rank."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.dit.cache import CacheSettings
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.errors import UnavailableError
from glm_image.lifecycle.context import ProgressCallback, RequestContext
from glm_image.parallel.rank_group import WorkerConfig
from glm_image.pipeline import LocalPipeline, paint_request
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, PaintRequest
from parity.test_parallel import REQUESTS, WAIT_SECONDS, worker_pids
from rank_devices import rank_devices, require_gpus

if torch.cuda.device_count() < 2:
    pytest.skip("needs several GPUs", allow_module_level=True)

logger = logging.getLogger(__name__)

STEPS = 12
"""Enough that some are cached."""

LAYOUTS = ["cfg=2", "ulysses=2", "ring=2", "tp=2"]
LARGE_LAYOUTS = ["cfg=2,ulysses=2", "cfg=2,tp=2", "ulysses=4", "ring=4", "tp=4"]
VARIANTS = {
    "plain": DitSettings(),
    "cached": DitSettings(cache=CacheSettings(residual_diff_threshold=1e9)),
    "int8": DitSettings(quantization="int8"),
    "fp8": DitSettings(quantization="fp8"),
}
MOST_ERROR = 1.5
"""Of bf16 on ranks, relative to the error of bf16 on one GPU; both against fp32."""

Pictures = dict[str, NDArray[np.float64]]


@pytest.fixture(scope="module")
def paint_requests(pipeline: LocalPipeline) -> dict[str, PaintRequest]:
    resolved = {
        name: pipeline.resolve(replace(request, num_inference_steps=STEPS)) for name, request in REQUESTS.items()
    }
    return {name: paint_request(request, pipeline.prior(request), {}) for name, request in resolved.items()}


def paint(checkpoint: Path, settings: DitSettings, ranks: int, requests: dict[str, PaintRequest]) -> Pictures:
    devices = rank_devices(ranks)
    first = open_device(devices[0])
    first.set_current()
    settings = replace(settings, warmup_sizes=())
    engine = DitEngine(Checkpoint.open(checkpoint), first, settings, workers=WorkerConfig(devices[1:]))
    try:
        return {
            name: engine.paint(RequestContext(), request, Limits()).result(WAIT_SECONDS).pixels.astype(np.float64)
            for name, request in requests.items()
        }
    finally:
        engine.close()


class OneGpu:
    """Pictures of one GPU, painted once for each variant."""

    def __init__(self, checkpoint: Path, requests: dict[str, PaintRequest]) -> None:
        self._checkpoint, self._requests = checkpoint, requests
        self._painted: dict[DitSettings, Pictures] = {}

    def __call__(self, settings: DitSettings) -> Pictures:
        if settings not in self._painted:
            self._painted[settings] = paint(self._checkpoint, settings, 1, self._requests)
        return self._painted[settings]


@pytest.fixture(scope="module")
def one_gpu(checkpoint_folder: Path, paint_requests: dict[str, PaintRequest]) -> OneGpu:
    return OneGpu(checkpoint_folder, paint_requests)


def error(got: Pictures, want: Pictures) -> float:
    """Returns the root mean square of the differences of all pictures' values, of 255."""
    differences = np.concatenate([(got[name] - want[name]).ravel() for name in want])
    return float(np.sqrt(np.mean(differences**2)))


@pytest.mark.parametrize(
    ("parallel", "variant"),
    [(parallel, variant) for variant in VARIANTS for parallel in LAYOUTS]
    + [(parallel, "plain") for parallel in LARGE_LAYOUTS],
)
def test_images_are_as_exact_as_those_of_one_gpu(
    checkpoint_folder: Path, paint_requests: dict[str, PaintRequest], one_gpu: OneGpu, parallel: str, variant: str
) -> None:
    ranks = math.prod(int(ways) for ways in re.findall(r"\d", parallel))
    require_gpus(ranks)
    settings = VARIANTS[variant]
    exact = one_gpu(replace(settings, dtype="float32", quantization="none"))
    alone = one_gpu(settings)
    together = paint(checkpoint_folder, replace(settings, parallel=parallel), ranks, paint_requests)
    of_one, of_ranks = error(alone, exact), error(together, exact)
    logger.info("%s, %s: error %.3f on %d ranks, %.3f on one", variant, parallel, of_ranks, ranks, of_one)
    assert of_ranks <= MOST_ERROR * of_one


def decoder(checkpoint: Path, settings: ArSettings, ranks: int, workers: WorkerConfig | None = None) -> ArEngine:
    devices = rank_devices(ranks)
    first = open_device(devices[0])
    first.set_current()
    workers = replace(workers or WorkerConfig(), devices=devices[1:])
    return ArEngine(Checkpoint.open(checkpoint), first, settings, workers=workers)


def parameters(side: int = 256) -> GenerationParameters:
    return GenerationParameters(prompt="a red fox 'NEWS'", height=side, width=side, seed=5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_in_fp32_equal_those_of_one_gpu(checkpoint_folder: Path, ranks: int) -> None:
    require_gpus(ranks)
    tokens = []
    for count in (1, ranks):
        engine = decoder(checkpoint_folder, ArSettings(dtype="float32"), count)
        try:
            resolved = parameters().resolve(Limits(), engine.sampling)
            tokens.append(engine.submit(RequestContext(), resolved).result(WAIT_SECONDS).prior_token_ids)
        finally:
            engine.close()
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_rank_ends_the_requests_with_an_error(checkpoint_folder: Path, kind: signal.Signals) -> None:
    lost, decoding = threading.Event(), threading.Event()
    # A killed rank is noticed immediately. A rank that hangs is noticed after this time, which covers compiling the
    # kernels of the first step.
    workers = WorkerConfig(hang_seconds=WAIT_SECONDS / 2, on_loss=lambda _: lost.set())
    engine = decoder(checkpoint_folder, ArSettings(), 2, workers)
    try:
        (worker,) = worker_pids(os.getpid())
        context = RequestContext(observers=(ProgressCallback(lambda _: decoding.set()),))
        running = engine.submit(context, parameters(1024).resolve(Limits(), engine.sampling))
        assert decoding.wait(WAIT_SECONDS)
        started = time.monotonic()
        os.kill(worker, kind)
        with pytest.raises(UnavailableError, match=f"rank 1 .cuda:1, pid {worker}.*send the request again"):
            running.result(WAIT_SECONDS)
        logger.info("%s: answered after %.2f s", kind.name, time.monotonic() - started)
        assert lost.wait(WAIT_SECONDS)
    finally:
        closing = time.monotonic()
        engine.close()
        logger.info("%s: closed in %.2f s", kind.name, time.monotonic() - closing)
    loading = time.monotonic()
    engine = decoder(checkpoint_folder, ArSettings(), 2)
    logger.info("%s: loaded again in %.2f s", kind.name, time.monotonic() - loading)
    engine.close()
    assert not worker_pids(os.getpid())

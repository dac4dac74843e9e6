"""Batch admission in a real server: requests that arrive one by one still decode together."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from glm_image.supervisor import ServerSettings, TritonServer
from server.kserve import Outputs, Values, grpc_infer, metadata
from server.test_metrics import Page, page_when
from server.test_placement import copy_repository, set_parameter

IN_FLIGHT, REQUESTS, SEEDS = 6, 18, 3
# Denoising takes longer than decoding, so the AR nearly always waits.
REQUEST: Values = {"prompt": "A fox", "height": 64, "width": 64, "num_inference_steps": 200, "guidance_scale": 3.0}


@pytest.fixture
def batching(tiny_checkpoint: Path, same_threads: None, tmp_path: Path) -> Iterator[TritonServer]:
    repository = copy_repository(tmp_path / "models", "glm_image", "glm_ar", "glm_dit", "glm_control")
    set_parameter(repository, "glm_ar", "admission", "gathered")
    log = io.StringIO()
    with TritonServer(ServerSettings(tiny_checkpoint, model_repository=repository, drain_seconds=5), log=log) as server:
        yield server
    assert "has not reported in the expected time" not in log.getvalue()


def paint(server: TritonServer, seed: int) -> Outputs:
    return grpc_infer(server, {**REQUEST, "seed": seed})


def page_at(server: TritonServer, tokens: float) -> Page:
    """Returns the metrics when so many tokens are counted."""
    page = page_when(server, lambda page: page["ar_tokens_total"] >= tokens)
    assert page["ar_tokens_total"] == tokens
    return page


def stream_steps(server: TritonServer) -> float:
    """Sends each request when another is answered, checks their bytes, and returns the decode steps they took."""
    started = page_when(server, lambda page: page.load() == (0, 0))["ar_tokens_total"]
    alone = [paint(server, seed) for seed in range(SEEDS)]
    tokens_of = metadata(alone[0])["tokens"]
    tokens = tokens_of["preview"] + tokens_of["image"]
    before = page_at(server, started + SEEDS * tokens)
    with ThreadPoolExecutor(IN_FLIGHT) as clients:
        together = list(clients.map(lambda number: paint(server, number % SEEDS), range(REQUESTS)))
    after = page_at(server, started + (SEEDS + REQUESTS) * tokens)
    for expected, outputs in zip(itertools.cycle(alone), together, strict=False):
        np.testing.assert_array_equal(outputs["images"], expected["images"])
    steps = after["ar_step_seconds_count"] - before["ar_step_seconds_count"]
    assert steps >= (tokens - 1) * REQUESTS / IN_FLIGHT
    return steps


@pytest.mark.full
def test_gathered_admission_takes_fewer_decode_steps_and_returns_the_same_bytes(
    triton: TritonServer, batching: TritonServer
) -> None:
    assert stream_steps(batching) < stream_steps(triton) / 2

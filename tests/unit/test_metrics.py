"""The metrics that engines record: the work that was done, however a request ended."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from glm_image.ar import metrics as ar
from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.dit import metrics as dit
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.errors import (
    CancelledError,
    ConfigurationError,
    DeadlineExceededError,
    DeviceMemoryError,
    InvalidInputError,
    QueueFullError,
    UnavailableError,
)
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, PaintRequest
from glm_image.request.stages import Stage
from glm_image.telemetry.metrics import LatencyRecorder, MetricSpec

WAIT_SECONDS = 60
SLOTS = 2


class Records:
    """Keeps the recorded values in their order."""

    def __init__(self) -> None:
        self.values: list[tuple[MetricSpec, float, int]] = []
        self._lock = threading.Lock()

    def __call__(self, metric: MetricSpec, value: float, times: int = 1, /) -> None:
        with self._lock:
            self.values.append((metric, value, times))

    def of(self, metric: MetricSpec) -> list[float]:
        return [value for found, value, _ in self.values if found is metric]

    def times(self, metric: MetricSpec) -> int:
        return sum(times for found, _, times in self.values if found is metric)


@pytest.fixture
def records() -> Records:
    return Records()


@pytest.fixture
def engine(checkpoint_folder: Path, records: Records) -> Iterator[ArEngine]:
    settings = ArSettings(max_num_seqs=SLOTS, max_sequence_tokens=512)
    opened = ArEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), settings, records)
    yield opened
    opened.close()


def parameters(images: int) -> GenerationParameters:
    return GenerationParameters(prompt="x", height=32, width=64, seed=1, num_images=images)


def test_loading_counts_as_no_work(engine: ArEngine, records: Records) -> None:
    assert [metric for metric, _, _ in records.values] == [ar.KV_CACHE_BYTES]


def test_sequences_are_counted_from_the_queue_to_the_end(engine: ArEngine, records: Records) -> None:
    resolved = parameters(3).resolve(Limits(), engine.sampling)
    engine.submit(RequestContext(), resolved).result(WAIT_SECONDS)
    engine.close()
    length = sum(grid.tokens for grid in resolved.grids)
    assert sum(records.of(ar.TOKENS)) == 3 * length
    assert records.times(ar.PREFILL_SECONDS) == 3
    # The first token of each comes with its prompt.
    assert sum(records.of(ar.ACCEPTED_TOKENS)) == 3 * (length - 1)
    assert max(records.of(ar.ACCEPTED_TOKENS)) <= ArSettings().speculation_window
    assert records.times(ar.STEP_SECONDS) <= records.times(ar.ACCEPTED_TOKENS) <= 3 * (length - 1)
    loads = list(zip(records.of(ar.RUNNING), records.of(ar.WAITING), strict=True))
    assert loads[0] == (0, 3)
    assert (2, 1) in loads
    assert loads[-1] == (0, 0)
    assert all(before != after for before, after in itertools.pairwise(loads))
    assert records.of(ar.OCCUPANCY) == [running / SLOTS for running, _ in loads]


def test_a_cancelled_request_leaves_the_work_that_was_done(engine: ArEngine, records: Records) -> None:
    context = RequestContext()

    def cancel_half_way(progress: Progress) -> None:
        if progress.stage == Stage.DECODE and progress.done >= progress.total // 2:
            context.cancel()

    context.add_observer(ProgressCallback(cancel_half_way))
    resolved = parameters(1).resolve(Limits(), engine.sampling)
    with pytest.raises(CancelledError):
        engine.submit(context, resolved).result(WAIT_SECONDS)
    engine.close()
    length = sum(grid.tokens for grid in resolved.grids)
    assert length // 2 <= sum(records.of(ar.TOKENS)) < length
    assert sum(records.of(ar.TOKENS)) == 1 + sum(records.of(ar.ACCEPTED_TOKENS))
    assert (records.of(ar.RUNNING)[-1], records.of(ar.WAITING)[-1]) == (0, 0)


def paint_request(steps: int, output_format: str) -> PaintRequest:
    return PaintRequest(
        prompt="x",
        prior_token_ids=np.arange(4, dtype=np.int32).reshape(2, 2),
        grid=Grid(1, 2),
        requested=Size(32, 64),
        seeds=(1, 2),
        num_inference_steps=steps,
        output_format=output_format,
    )


@pytest.fixture
def dit_engine(checkpoint_folder: Path, records: Records) -> DitEngine:
    settings = DitSettings(warmup_sizes=(Size(32, 32),))
    return DitEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), settings, records)


def test_warming_up_counts_as_no_work(dit_engine: DitEngine, records: Records) -> None:
    assert [metric for metric, _, _ in records.values] == [dit.PEAK_MEMORY]


@pytest.mark.parametrize(("output_format", "encoded"), [("raw", 0), ("png", 2)])
def test_images_are_counted(dit_engine: DitEngine, records: Records, output_format: str, encoded: int) -> None:
    context, request = RequestContext(), paint_request(3, output_format)
    dit_engine.paint(context, request, Limits()).result()
    assert records.times(dit.STEP_SECONDS) == 6
    assert sum(value * times for metric, value, times in records.values if metric is dit.STEP_SECONDS) == (
        pytest.approx(context.seconds["denoise"], rel=0.1)
    )
    assert records.times(dit.VAE_SECONDS) == 2
    assert records.times(dit.ENCODE_SECONDS) == encoded
    assert sum(records.of(dit.IMAGES)) == 2
    assert len(records.of(dit.PEAK_MEMORY)) == 2
    assert records.of(dit.CACHED_STEPS) == []


def test_a_cancelled_image_leaves_the_steps_it_took(dit_engine: DitEngine, records: Records) -> None:
    context = RequestContext()
    context.add_observer(ProgressCallback(lambda progress: context.cancel() if progress.done == 4 else None))
    with pytest.raises(CancelledError):
        dit_engine.paint(context, paint_request(3, "raw"), Limits())
    assert records.times(dit.STEP_SECONDS) == 4
    assert records.of(dit.IMAGES) == []


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (InvalidInputError("x"), "refused"),
        (QueueFullError("x"), "refused"),
        (DeviceMemoryError("x"), "refused"),
        (UnavailableError("x"), "refused"),
        (CancelledError("x"), "cancelled"),
        (DeadlineExceededError("x"), "deadline"),
        (ConfigurationError("x"), "failed"),
        (ValueError("x"), "failed"),
    ],
)
def test_latencies_are_recorded_by_stage_and_outcome(records: Records, error: Exception | None, outcome: str) -> None:
    context = RequestContext(received_ns=time.monotonic_ns() - 3 * 10**9)
    context.add_observer(LatencyRecorder(dit.DIT_LATENCIES, records))
    context.seconds = {Stage.DECODE: 7.0, Stage.DENOISE: 1.5, Stage.VAE: 0.25}
    context.finish(error)
    (seconds,) = records.of(dit.DIT_LATENCIES.requests[outcome])
    assert seconds >= 3
    assert records.of(dit.DIT_LATENCIES.stages[Stage.DENOISE, outcome]) == [1.5]
    assert records.of(dit.DIT_LATENCIES.stages[Stage.VAE, outcome]) == [0.25]
    assert len(records.values) == 3  # the first stage has recorded its own

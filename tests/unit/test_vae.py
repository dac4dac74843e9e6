"""The VAE in tiles, and the finisher that decodes and encodes while the next request is denoised."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Memory
from glm_image.devices.cpu import CpuDevice
from glm_image.devices.open import open_device
from glm_image.dit.engine import UNFINISHED_REQUESTS, DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.pipeline import LocalPipeline
from glm_image.request import images
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest

WAIT_SECONDS = 60
WIDE, SQUARE = Grid(1, 34), Grid(2, 2)  # one above the checkpoint's tile of 1024 pixels, one below


def request(grid: Grid, output_format: str = "raw") -> PaintRequest:
    tokens = np.arange(grid.tokens, dtype=np.int32)[None]
    size = Size(grid.height * 32, grid.width * 32)
    return PaintRequest("a", tokens, grid, size, seeds=(3,), num_inference_steps=1, output_format=output_format)


def rendered(engine: DitEngine, grid: Grid) -> NDArray[np.int64]:
    return engine.paint(RequestContext(), request(grid), Limits()).result().pixels.astype(int)


def test_tiles_change_large_images_little_and_others_not_at_all(
    checkpoint_folder: Path, pipeline: LocalPipeline
) -> None:
    tiled = DitEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), DitSettings(vae_tiling="on"))
    assert np.array_equal(rendered(tiled, SQUARE), rendered(pipeline.dit, SQUARE))
    exact, in_tiles = rendered(pipeline.dit, WIDE), rendered(tiled, WIDE)
    assert exact.shape == in_tiles.shape == (1, 32, 1088, 3)
    assert 0 < np.abs(exact - in_tiles).mean() < 8


@pytest.mark.parametrize(
    ("tiling", "gigabytes", "expected"), [("off", 1, False), ("auto", 1, True), ("auto", 64, False)]
)
def test_auto_tiles_where_the_largest_image_does_not_fit(
    checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch, tiling: str, gigabytes: int, expected: bool
) -> None:
    monkeypatch.setattr(CpuDevice, "memory", lambda _: Memory(gigabytes * 10**9, gigabytes * 10**9))
    engine = DitEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), DitSettings(vae_tiling=tiling))
    assert engine.executor._vae._autoencoder.use_tiling is expected


class FinisherCpu(CpuDevice):
    """A CPU on which requests are finished in a thread of their own, as on an accelerator."""

    is_host = False


@pytest.fixture
def engine(checkpoint_folder: Path) -> Iterator[DitEngine]:
    opened = DitEngine(Checkpoint.open(checkpoint_folder), FinisherCpu(torch.device("cpu")), DitSettings())
    yield opened
    opened.close()


def test_next_request_is_denoised_while_one_is_encoded(engine: DitEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, may_go_on = threading.Event(), threading.Event()
    encode = images.encode

    def held(*given: Any) -> bytes:
        encoding.set()
        assert may_go_on.wait(WAIT_SECONDS)
        return encode(*given)

    monkeypatch.setattr(images, "encode", held)
    first = engine.paint(RequestContext(), request(SQUARE, "png"), Limits())
    try:
        assert encoding.wait(WAIT_SECONDS)
        context = RequestContext()
        second = engine.paint(context, request(SQUARE, "png"), Limits())
        assert context.seconds["denoise"] > 0
        assert not first.done()
        assert not engine._unfinished.acquire(blocking=False), f"{UNFINISHED_REQUESTS} requests are unfinished"
    finally:
        may_go_on.set()
    assert first.result(WAIT_SECONDS).encoded == second.result(WAIT_SECONDS).encoded


def test_error_while_encoding_reaches_the_caller_and_frees_the_finisher(
    engine: DitEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("cannot encode")

    with monkeypatch.context() as patch:
        patch.setattr(images, "encode", fail)
        for _ in range(UNFINISHED_REQUESTS + 1):
            with pytest.raises(RuntimeError, match="cannot encode"):
                engine.paint(RequestContext(), request(SQUARE, "png"), Limits()).result(WAIT_SECONDS)
    assert engine.paint(RequestContext(), request(SQUARE, "png"), Limits()).result(WAIT_SECONDS).encoded
    assert not engine.executor._images


def test_error_while_decoding_keeps_nothing_of_its_request(engine: DitEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    activations: list[weakref.ref[torch.Tensor]] = []

    def fail(_: torch.Tensor) -> None:
        activation = torch.zeros(8)
        activations.append(weakref.ref(activation))
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(engine.executor._vae, "decode", fail)
    asked = request(SQUARE, "png")
    requests = weakref.ref(asked)
    gc.collect()
    gc.disable()
    try:
        future = engine.paint(RequestContext(), asked, Limits())
        assert isinstance(future.exception(WAIT_SECONDS), RuntimeError)
        del future, asked
        assert engine._finisher is not None
        engine._finisher.submit(int).result(WAIT_SECONDS)  # its thread has left the call that failed
        assert (activations[0](), requests()) == (None, None)
    finally:
        gc.enable()

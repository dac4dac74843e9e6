from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import GlmImageTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.cpu import CpuDevice
from glm_image.dit.commands import Drop, Prepare, Step
from glm_image.dit.select_blocks import select_blocks
from glm_image.dit.step import MIN_STEPS_TO_CAPTURE, CapturedStep, StepCapture
from glm_image.errors import DeviceMemoryError
from glm_image.pipeline import LocalPipeline
from glm_image.request.geometry import Grid

GRID = Grid(1, 2)


class MathAttentionCpu(CpuDevice):
    """A CPU with another attention backend of diffusers."""

    attention_backend = "_native_math"


def test_attention_backend_has_its_name_in_diffusers(checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers sets it for all transformers of the process.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry.get_active_backend()[0])
    config = Checkpoint.open(checkpoint_folder).config("transformer")
    transformer = GlmImageTransformer2DModel.from_config(config | {"num_layers": 1})
    cpu = torch.device("cpu")
    assert select_blocks(transformer, CpuDevice(cpu)).attention_backend == "native"
    assert select_blocks(transformer, MathAttentionCpu(cpu)).attention_backend == "_native_math"


@pytest.mark.parametrize("steps_taken", [0, 1, 3])
def test_dropped_image_is_freed_without_garbage_collection(pipeline: LocalPipeline, steps_taken: int) -> None:
    """A captured step that waits for the garbage collector may be freed during the capture of another step."""
    executor = pipeline.dit.executor
    tokens = np.zeros(GRID.tokens, dtype=np.int32)
    executor.run(Prepare(-5, (), (), tokens, GRID, MIN_STEPS_TO_CAPTURE + 1, 1.5, seed=0))
    for _ in range(steps_taken):
        executor.run(Step(-5))
    latents = weakref.ref(executor._images[-5].latents)
    gc.disable()
    try:
        executor.run(Drop(-5))
        assert latents() is None
    finally:
        gc.enable()


class RecordingCpu(CpuDevice):
    """A CPU that records what is captured."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.captures: list[tuple[bool, object | None]] = []

    def capture(
        self, step: Callable[[], None], *, warm: bool = False, pool: object | None = None
    ) -> Callable[[], None]:
        self.captures.append((warm, pool))
        return step


def test_step_runs_eagerly_once_and_is_captured_on_the_second_call() -> None:
    device, pool = RecordingCpu(), object()
    runs: list[int] = []
    step = CapturedStep(lambda: runs.append(len(device.captures)), device, pool)
    for _ in range(4):
        step()
    assert runs == [0, 1, 1, 1]
    assert device.captures == [(True, pool)]


@pytest.mark.parametrize(("steps", "is_captured"), [(MIN_STEPS_TO_CAPTURE - 1, False), (MIN_STEPS_TO_CAPTURE, True)])
def test_images_of_few_steps_are_not_captured(steps: int, is_captured: bool) -> None:
    def compute() -> None:
        """Does nothing."""

    assert (StepCapture(RecordingCpu(), steps)(compute) is not compute) == is_captured


def test_out_of_memory_drops_the_image_and_releases_its_memory(
    pipeline: LocalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = pipeline.dit.executor
    tokens = np.zeros(GRID.tokens, dtype=np.int32)
    for number in (-5, -6):
        executor.run(Prepare(number, (), (), tokens, GRID, 2, 1.5, seed=0))
    released: list[bool] = []
    monkeypatch.setattr(executor._device, "release_unused", lambda: released.append(-5 in executor._images))
    monkeypatch.setattr(executor._images[-5], "step", lambda: torch.empty(1 << 50, dtype=torch.uint8))
    with pytest.raises(DeviceMemoryError, match=r"during a denoising step of an image of 64 x 32: .* 2 images and "):
        executor.run(Step(-5))
    assert released == [True, False], "once for what the step held, and once after the image is dropped"
    executor.run(Drop(-5))
    assert executor.run(Step(-6)) is False
    executor.run(Drop(-6))
    assert not executor._images

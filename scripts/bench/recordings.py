"""What the steps of both stages launch on an NPU, recorded on the stand-in for CANN."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from glm_image.ar.commands import Admit
from glm_image.ar.commands import Step as DecodeStep
from glm_image.ar.config import ArConfig
from glm_image.ar.executor import Executor as ArExecutor
from glm_image.ar.model import Decoder
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.open import named_dtype
from glm_image.dit import latent_preview
from glm_image.dit.commands import Decode, Prepare
from glm_image.dit.executor import Executor as DitExecutor
from glm_image.dit.loading import load_executor
from glm_image.dit.settings import DitSettings
from glm_image.parallel.process_group import ONE_RANK
from glm_image.request.geometry import Grid

LAUNCHES = ("launch", "captured", "replay")
WAITS = ("wait", "host_access")
SMALL_BYTES = 1 << 20
RENDERED_TEXT = ("NEWS",)
SMALL_GRID = Grid(8, 8)
GUIDANCE = 1.5

Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """What is recorded: the sizes of the AR's batch, and an image."""

    slots: int = 8
    positions: int = 512
    prompt_tokens: int = 24
    grid: Grid = SMALL_GRID
    preview: Grid = SMALL_GRID
    dtype: str = "auto"
    quantization: str = "none"


def standin() -> Any:
    """Returns the stand-in's functions for benchmarks.

    Raises:
        SystemExit: this process does not run on the stand-in.
    """
    try:
        library = ctypes.CDLL("libascendcl.so")
        library.standin_log_stop.restype = ctypes.c_char_p
        library.standin_run_up_to.argtypes = (ctypes.c_size_t,)
    except (AttributeError, OSError):
        sys.exit("error: the launches are logged by the stand-in for CANN only: run scripts/npu_standin -- COMMAND")
    return library


@contextmanager
def recorded() -> Iterator[Events]:
    """Yields a list that has what the block did on the device when it ends."""
    library, events = standin(), Events()
    torch.npu.synchronize()  # type: ignore[attr-defined] - launches go through a queue
    library.standin_log_start()
    try:
        yield events
    finally:
        torch.npu.synchronize()  # type: ignore[attr-defined]
        events.extend(json.loads(line) for line in library.standin_log_stop().decode().splitlines())
        events.pop()  # the wait of this function


@contextmanager
def only_small_launches() -> Iterator[None]:
    """Records without computing: launches that touch much memory do not run, so values are garbage."""
    library, fit = standin(), latent_preview.fit
    library.standin_run_up_to(SMALL_BYTES)
    latent_preview.fit = lambda _: None  # type: ignore[assignment,return-value] - it cannot fit garbage
    try:
        yield
    finally:
        library.standin_run_up_to(2**64 - 1)
        latent_preview.fit = fit


def launches(events: Events) -> Events:
    return [event for event in events if event["kind"] in LAUNCHES]


def record_capture(device: Device, step: Callable[[], None]) -> tuple[Events, Callable[[], None]]:
    """Captures a step that has run before; returns what the capture records, and the replay."""
    with recorded() as events:
        replay = device.capture(step, warm=True)
    return [event for event in events if event["kind"] == "captured"], replay


def record_ar(checkpoint: Checkpoint, device: Device, work: Workload, layers: int) -> dict[str, Events]:
    """Records a decode step, its replay and a prefill of a decoder with some layers."""
    config = replace(ArConfig.read(checkpoint), layers=layers)
    dtype = named_dtype(work.dtype) or device.default_dtype
    source = checkpoint.tensors("vision_language_encoder", device.torch_device, dtype)
    int8 = device.int8_product if work.quantization == "int8" else None
    decoder = Decoder.load(config, source, int8=int8)
    counted: dict[str, Events] = {}
    capture = device.capture

    def recorded_capture(step: Callable[[], None], **_: Any) -> Callable[[], None]:
        step()
        device.capture = capture  # type: ignore[method-assign]
        counted["decode"], replay = record_capture(device, step)
        return replay

    device.capture = recorded_capture  # type: ignore[assignment,method-assign]
    executor = ArExecutor(decoder, device, work.slots, work.positions, capture=True)
    prefill = executor._prefill

    def counted_prefill(*arguments: Any) -> Any:
        with recorded() as counted["prefill"]:
            return prefill(*arguments)

    executor._prefill = counted_prefill
    ids = tuple(config.vision_vocab_size + index for index in range(work.prompt_tokens))
    executor.run(Admit(0, ids, (work.preview, work.grid), config.sampling, seed=0))
    executor.run(DecodeStep(1))
    with recorded() as counted["replay"]:
        executor._decode_step()  # type: ignore[misc]
    executor.close()
    return counted


class FewLayers(Checkpoint):
    """A checkpoint whose transformer has only the first layers."""

    def config(self, component: str) -> dict[str, Any]:
        config = super().config(component)
        return {**config, "num_layers": self.layers} if component == "transformer" else config

    @property
    def layers(self) -> int:
        return int(self.__dict__["transformer_layers"])


def few_layers(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    few = FewLayers(checkpoint.folder, checkpoint.load_format)
    few.__dict__["transformer_layers"] = layers
    return few


def record_dit(checkpoint: Checkpoint, device: Device, work: Workload, layers: int) -> dict[str, Events]:
    """Records a denoising step with guidance, its replay and a decode by the VAE of a transformer with some layers."""
    settings = DitSettings(dtype=work.dtype, quantization=work.quantization, warmup_sizes=())
    executor = load_executor(few_layers(checkpoint, layers), settings, device, ONE_RANK)
    assert isinstance(executor, DitExecutor)
    ids = np.zeros(work.grid.tokens, dtype=np.int32)
    executor.run(Prepare(0, RENDERED_TEXT, ("",), ids, work.grid, 50, GUIDANCE, seed=0))
    image = executor._images[0]
    step = image.step._compute._compute  # type: ignore[union-attr]
    counted: dict[str, Events] = {}
    with torch.inference_mode():
        step()
        counted["denoise"], replay = record_capture(device, step)
        with recorded() as counted["replay"]:
            replay()
    image.step = None
    with recorded() as counted["vae"]:
        executor.run(Decode(0))
    executor.close()
    return counted

"""What stages say they need is what they allocate; what does not fit is refused in words."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from glm_image.ar.config import ArConfig
from glm_image.ar.memory import activation_bytes, state_bytes, weight_bytes
from glm_image.ar.model import Decoder
from glm_image.ar.rotary import rotary_tables
from glm_image.ar.state import DecodeState
from glm_image.ar.vision import Vision
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Memory
from glm_image.devices.budget import check_budget
from glm_image.devices.cpu import CpuDevice
from glm_image.devices.open import open_device
from glm_image.devices.quantization import dequantized_product
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.errors import ConfigurationError
from glm_image.request.geometry import prompt_positions
from helpers import MakeCheckpoint
from make_tiny_checkpoint import make_tiny_checkpoint
from tiny_checkpoint_configs import FULL

CPU = torch.device("cpu")
GB = 10**9
POSITIONS = 640
ANOTHER = "give the stage another device"
DTYPES = [torch.float32, torch.bfloat16]


def config_of(folder: Path) -> ArConfig:
    return ArConfig.read(Checkpoint.open(folder))


def decoder_of(folder: Path, dtype: torch.dtype, *, int8: bool = False) -> Decoder:
    tensors = Checkpoint.open(folder).tensors("vision_language_encoder", CPU, dtype)
    return Decoder.load(config_of(folder), tensors, int8=dequantized_product if int8 else None)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_take_what_is_said(checkpoint_folder: Path, dtype: torch.dtype, int8: bool) -> None:
    allocated = sum(weight.nbytes for weight in decoder_of(checkpoint_folder, dtype, int8=int8).parameters())
    assert weight_bytes(config_of(checkpoint_folder), dtype, int8=int8) == allocated


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vision_tower_takes_what_is_said(checkpoint_folder: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(checkpoint_folder)
    loaded = vars(Vision.load(checkpoint, CPU, dtype))
    modules = [part for part in loaded.values() if isinstance(part, torch.nn.Module)]
    allocated = sum(weight.nbytes for module in modules for weight in module.parameters())
    assert Vision.bytes_needed(checkpoint, dtype) == allocated


def allocated_peak(run: Any) -> int:
    """The most bytes of tensors alive at once while ``run`` runs, beyond those before."""
    gc.collect()  # what is collected meanwhile would count as freed by it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    recorded = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_takes_what_is_said(checkpoint_folder: Path, dtype: torch.dtype) -> None:
    config = config_of(checkpoint_folder)
    said = sum(state_bytes(config, 3, POSITIONS, dtype).values())
    kept: list[DecodeState] = []
    peak = allocated_peak(lambda: kept.append(DecodeState.idle(config, 3, POSITIONS, CPU, dtype)))
    assert said <= peak <= said * 1.02  # tables of allowed ids have makings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_the_longest_prompt_takes_no_more_than_said(checkpoint_folder: Path, dtype: torch.dtype, int8: bool) -> None:
    decoder, config = decoder_of(checkpoint_folder, dtype, int8=int8), config_of(checkpoint_folder)
    state = DecodeState.idle(config, 1, POSITIONS, CPU, dtype)
    ids = torch.zeros(POSITIONS, dtype=torch.int64)
    tables = rotary_tables(config, prompt_positions(POSITIONS, ()), CPU, dtype)
    peak = allocated_peak(lambda: decoder.prefill(ids, *tables, state.cache, 0))
    said = activation_bytes(config, 1, POSITIONS, dtype, int8=int8)
    assert said / 2 <= peak <= said


def test_the_published_sizes_leave_room_on_a_32_gb_card(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "full", FULL, weights=False)
    checkpoint = Checkpoint.open(folder, "dummy")
    config, dtype = ArConfig.read(checkpoint), torch.bfloat16
    weights = weight_bytes(config, dtype) + Vision.bytes_needed(checkpoint, dtype)
    state = state_bytes(config, 8, 8192, dtype)
    beside = sum(state.values()) - state["8 x 8192 cached tokens"] + activation_bytes(config, 8, 8192, dtype)
    assert state["8 x 8192 cached tokens"] == pytest.approx(40 * 2 * 8 * 2 * 8192 * 128 * 2)
    assert beside <= 2 * GB
    assert weights + sum(state.values()) + beside < 0.9 * 32 * GB
    assert weight_bytes(config, dtype, int8=True) < 0.6 * weight_bytes(config, dtype)


def test_what_fits_is_let_by() -> None:
    check_budget("x", {"weights": 5 * GB}, {"cache": 4 * GB}, Memory(9 * GB, 10 * GB), 0.9, "npu:0", "max_num_seqs")
    check_budget("x", {"weights": 5 * GB}, {}, Memory(5 * GB, 10 * GB), 1.0, "npu:0")


@pytest.mark.parametrize(
    ("memory", "utilization", "remedies"),
    [
        (Memory(8 * GB, 16 * GB), 0.9, f"lower max_num_seqs, or {ANOTHER}"),
        (Memory(16 * GB, 16 * GB), 0.5, f"lower max_num_seqs, or raise memory_utilization, or {ANOTHER}"),
        (Memory(4 * GB, 16 * GB), 0.9, ANOTHER),
        (Memory(16 * GB, 16 * GB), 0.25, f"raise memory_utilization, or {ANOTHER}"),
        (Memory(8 * GB, 8 * GB), 1.0, f"lower max_num_seqs, or {ANOTHER}"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_what_would_help(memory: Memory, utilization: float, remedies: str) -> None:
    allowed = min(memory.free, int(memory.total * utilization))
    with pytest.raises(ConfigurationError) as refused:
        check_budget("glm_ar", {"weights": 5 * GB}, {"cache": 4 * GB}, memory, utilization, "npu:0", "max_num_seqs")
    assert str(refused.value) == (
        f"glm_ar needs 9.0 GB: 5.0 GB for weights, 4.0 GB for cache; npu:0 has {memory.free / GB:.1f} GB free of "
        f"{memory.total / GB:.1f} GB, of which memory_utilization {utilization:g} allows {allowed / GB:.1f} GB: "
        + remedies
    )


class SmallDevice(CpuDevice):
    def memory(self) -> Memory:
        return Memory(free=2_000_000, total=3_000_000)


def test_the_second_stage_is_refused_before_anything_is_loaded(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(weights=False))  # loading would fail
    words = (
        r"glm_dit needs 2\.\d MB: .* for the weights of transformer, .* memory_utilization 0\.5 allows 1\.5 MB: raise"
    )
    with pytest.raises(ConfigurationError, match=words):
        DitEngine(checkpoint, SmallDevice(CPU), DitSettings(memory_utilization=0.5))


def test_the_hosts_memory_counts_what_only_caches_files_as_free() -> None:
    memory = open_device("cpu").memory()
    told = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    assert memory.total == int(told["MemTotal"]) * 1024
    assert memory.free == pytest.approx(int(told["MemAvailable"]) * 1024, rel=0.1)


def test_the_hosts_peak_is_that_of_the_process() -> None:
    peak = open_device("cpu").peak_memory()
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE))
    assert peak == pytest.approx(int(told["VmHWM"]) * 1024, rel=0.01)

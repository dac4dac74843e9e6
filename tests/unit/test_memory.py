"""The memory model of the first stage against its tensors, and the budget check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glm_image.ar.config import ArConfig
from glm_image.ar.memory import activation_bytes, head_bytes, state_bytes, weight_bytes
from glm_image.ar.model import Decoder
from glm_image.ar.rotary import rotary_tables
from glm_image.ar.state import DecodeState
from glm_image.ar.vision import Vision
from glm_image.ar.window import Window
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.checkpoint.layout import COMPONENTS
from glm_image.devices.base import Memory
from glm_image.devices.budget import check_budget
from glm_image.devices.cpu import CpuDevice
from glm_image.devices.open import open_device
from glm_image.devices.quantization import dequantized_product
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.errors import ConfigurationError
from glm_image.parallel.collectives import Group
from glm_image.request.geometry import prompt_positions
from glm_image.sizing.memory import PUBLISHED, ModelSizes, ar_memory
from helpers import MakeCheckpoint
from live_memory import allocated_peak
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


def sizes_of(folder: Path) -> ModelSizes:
    checkpoint = Checkpoint.open(folder)
    return ModelSizes.of({part: checkpoint.config(part) for part in COMPONENTS})


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from tensors_of(part)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ar_weights(checkpoint_folder: Path, dtype: torch.dtype, int8: bool) -> None:
    decoder = decoder_of(checkpoint_folder, dtype, int8=int8)
    allocated = sum(weight.nbytes for weight in decoder.parameters())
    config = config_of(checkpoint_folder)
    assert weight_bytes(config, dtype.itemsize, int8=int8) == allocated
    head = head_bytes(config, dtype.itemsize, int8=int8)
    assert head == sum(weight.nbytes for weight in decoder.head.parameters())
    weights = ar_memory(sizes_of(checkpoint_folder), name_of(dtype), 2, POSITIONS, int8=int8).weights
    assert weights["language model"] == allocated - head


@pytest.mark.parametrize("ranks", [2, 4])
def test_ar_weights_of_a_rank(checkpoint_folder: Path, ranks: int) -> None:
    config = config_of(checkpoint_folder)
    with torch.device("meta"):
        shares = [Decoder(config, Group(range(ranks), rank)) for rank in range(ranks)]
    parameters = [sum(weight.numel() for weight in share.parameters()) for share in shares]
    assert weight_bytes(config, 2, ranks=ranks) == 2 * max(parameters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vision_weights(checkpoint_folder: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(checkpoint_folder)
    loaded = vars(Vision.load(checkpoint, CPU, dtype))
    modules = [part for part in loaded.values() if isinstance(part, torch.nn.Module)]
    allocated = sum(weight.nbytes for module in modules for weight in module.parameters())
    assert Vision.bytes_needed(checkpoint, dtype) == allocated
    weights = ar_memory(sizes_of(checkpoint_folder), name_of(dtype), 2, POSITIONS).weights
    assert weights["vision and head"] == allocated + head_bytes(config_of(checkpoint_folder), dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ar_state(checkpoint_folder: Path, dtype: torch.dtype) -> None:
    config = config_of(checkpoint_folder)
    predicted = sum(state_bytes(config, 3, POSITIONS, dtype.itemsize).values())
    kept: list[DecodeState] = []
    peak = allocated_peak(lambda: kept.append(DecodeState.idle(config, 3, POSITIONS, CPU, dtype)))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_of(kept[0])}
    assert sum(storage.nbytes() for storage in storages.values()) == predicted
    assert predicted <= peak <= predicted * 1.02  # temporaries of the tables of allowed ids
    windows = tensors_of(Window.idle(3, POSITIONS, 48, CPU))
    speculating = sum(state_bytes(config, 3, POSITIONS, dtype.itemsize, rows=48).values())
    assert predicted + sum(tensor.nbytes for tensor in windows) == speculating


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_ar_activations_of_the_longest_prompt(checkpoint_folder: Path, dtype: torch.dtype, int8: bool) -> None:
    decoder, config = decoder_of(checkpoint_folder, dtype, int8=int8), config_of(checkpoint_folder)
    state = DecodeState.idle(config, 1, POSITIONS, CPU, dtype)
    ids = torch.zeros(POSITIONS, dtype=torch.int64)
    tables = rotary_tables(config, prompt_positions(POSITIONS, ()), CPU, dtype)
    peak = allocated_peak(lambda: decoder.prefill(ids, *tables, state.cache, 0))
    predicted = activation_bytes(config, 1, POSITIONS, dtype.itemsize, int8=int8)
    assert predicted / 2 <= peak <= predicted


def test_the_published_sizes_leave_room_on_a_32_gb_card(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "full", FULL, weights=False)
    checkpoint = Checkpoint.open(folder, "dummy")
    config, itemsize = ArConfig.read(checkpoint), 2
    assert config == PUBLISHED.decoder
    memory = ar_memory(PUBLISHED, "bfloat16", 8, 8192)
    assert memory == ar_memory(sizes_of(folder), "bfloat16", 8, 8192)
    assert sum(memory.weights.values()) == weight_bytes(config, 2) + Vision.bytes_needed(checkpoint, torch.bfloat16)
    weights = weight_bytes(config, itemsize) + Vision.bytes_needed(checkpoint, torch.bfloat16)
    state = state_bytes(config, 8, 8192, itemsize)
    rest = sum(state.values()) - state["8 x 8192 cached tokens"] + activation_bytes(config, 8, 8192, itemsize)
    assert state["8 x 8192 cached tokens"] == 40 * 2 * 8 * 2 * 8192 * 128 * 2
    assert rest <= 2 * GB
    assert weights + sum(state.values()) + rest < 0.9 * 32 * GB
    assert weight_bytes(config, itemsize, int8=True) < 0.6 * weight_bytes(config, itemsize)


def test_budget_accepts_what_fits() -> None:
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
def test_budget_error_names_the_remedies(memory: Memory, utilization: float, remedies: str) -> None:
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


def test_dit_budget_is_checked_before_loading(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(weights=False))  # loading would fail
    message = (
        r"glm_dit needs 2\.\d MB: .* for the weights of transformer, .* memory_utilization 0\.5 allows 1\.5 MB: raise"
    )
    with pytest.raises(ConfigurationError, match=message):
        DitEngine(checkpoint, SmallDevice(CPU), DitSettings(memory_utilization=0.5))


def test_host_memory_counts_the_page_cache_as_free() -> None:
    memory = open_device("cpu").memory()
    reported = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    assert memory.total == int(reported["MemTotal"]) * 1024
    assert memory.free == pytest.approx(int(reported["MemAvailable"]) * 1024, rel=0.1)


def test_host_peak_memory_is_that_of_the_process() -> None:
    peak = open_device("cpu").peak_memory()
    reported = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE))
    assert peak == pytest.approx(int(reported["VmHWM"]) * 1024, rel=0.01)

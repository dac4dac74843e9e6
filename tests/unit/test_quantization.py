"""The second stage with linear layers of 8 bits, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.accelerator import CudaDevice, NpuDevice
from glm_image.devices.base import Device
from glm_image.devices.open import open_device
from glm_image.devices.quantization import int8_sums, quantize_rows
from glm_image.dit.engine import DitEngine
from glm_image.dit.quantization import QuantizedLinear
from glm_image.dit.settings import DitSettings
from glm_image.errors import ConfigurationError
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest

GRID = Grid(2, 2)


def open_engine(folder: Path, quantization: str, device: Device | None = None) -> DitEngine:
    return DitEngine(Checkpoint.open(folder), device or open_device("cpu"), DitSettings(quantization=quantization))


def painted(engine: DitEngine) -> np.ndarray:
    tokens = np.arange(GRID.tokens, dtype=np.int32)[None]
    size = Size(GRID.height * 32, GRID.width * 32)
    request = PaintRequest("a 'b'", tokens, GRID, size, seeds=(3,), num_inference_steps=4)
    return engine.paint(RequestContext(), request, Limits()).result().pixels


def test_int8_paints_nearly_the_same_picture_with_less_memory(checkpoint_folder: Path) -> None:
    exact, rounded = open_engine(checkpoint_folder, "none"), open_engine(checkpoint_folder, "int8")
    layers = [m for m in rounded.executor._model.transformer.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 6 * rounded.executor._model.transformer.config.num_layers
    assert {layer.weight.dtype for layer in layers} == {torch.int8}
    theirs, ours = painted(exact).astype(int), painted(rounded).astype(int)
    assert 0 < np.abs(theirs - ours).mean() < 2
    assert np.array_equal(painted(rounded), ours)


def test_what_the_budget_counts_is_what_the_weights_take(checkpoint_folder: Path) -> None:
    from glm_image.dit.loading import _empty_modules
    from glm_image.dit.quantization import weight_bytes
    from glm_image.parallel.process_group import ONE_RANK

    settings = DitSettings(quantization="int8")
    modules = _empty_modules(Checkpoint.open(checkpoint_folder), settings, open_device("cpu"), torch.float32, ONE_RANK)
    empty = modules["transformer"]
    filled = open_engine(checkpoint_folder, "int8").executor._model.transformer
    scales = [module.scales for module in filled.modules() if isinstance(module, QuantizedLinear)]
    taken = sum(tensor.numel() * tensor.dtype.itemsize for tensor in [*filled.parameters(), *scales])
    assert weight_bytes(empty, torch.float32) == taken


def test_few_rows_are_multiplied_as_many_are() -> None:
    generator = torch.Generator().manual_seed(0)
    values, weight = (torch.randint(-127, 128, (n, 32), dtype=torch.int8, generator=generator) for n in (40, 48))
    many = int8_sums(values, weight)
    assert torch.equal(many, (values.int() @ weight.int().T).to(torch.int32))
    assert torch.equal(int8_sums(values[:3], weight), many[:3])


def test_a_row_is_rounded_to_half_a_step_whatever_the_others_are() -> None:
    matrix = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 6)[:, None]
    matrix[3] = 0
    values, scales = quantize_rows(matrix, torch.int8)
    assert ((values * scales - matrix).abs() <= scales * 0.5001).all()
    alone = quantize_rows(matrix[4:5], torch.int8)
    assert torch.equal(alone.values, values[4:5])
    assert torch.equal(alone.scales, scales[4:5])


def test_fp8_is_refused_where_there_are_no_such_products(
    checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="quantization is 'fp8', but a CPU has no fast fp8 products"):
        open_engine(checkpoint_folder, "fp8")
    cuda, npu = CudaDevice(torch.device("cuda:0")), object.__new__(NpuDevice)
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (cuda.unsupported_quantization_reason("fp8") is not None) == refused
        assert cuda.unsupported_quantization_reason("int8") is None
    assert npu.unsupported_quantization_reason("fp8") is not None
    assert npu.unsupported_quantization_reason("int8") is None

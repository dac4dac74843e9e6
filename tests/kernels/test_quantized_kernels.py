"""The fused blocks in 8 bits against diffusers' own blocks with the same layers in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import GlmImageTransformer2DModel
from torch import Tensor

from glm_image.checkpoint.checkpoint import fill
from glm_image.devices.open import open_device
from glm_image.devices.quantization import DTYPES, QuantizedRows, int8_sums, quantize_rows, scaled_product
from glm_image.dit.blocks import eager_blocks
from glm_image.dit.fused.blocks import FusedBlocks
from glm_image.dit.quantization import QuantizedLinear, block_linears
from glm_image.kernels.modulated_norm import SCALE_MLP, SHIFT_MLP, modulated_norm
from glm_image.kernels.rows import empty_rows, quantize_rowwise, sums_in_8_bits, sums_to_bf16
from kernels.blocks import LargeTensors, arguments, change_error, empty_transformer
from kernels.sizes import relative_error

# Quantization costs 0.021 and 0.058 of the blocks' change. The interpreter truncates to bf16 instead of rounding, which
# costs 0.018 by itself and changes 8-bit values, and it rounds fp8 differently.
MOST_ERROR = {"int8": 0.04, "fp8": 0.12}
MANTISSA, EXPONENT = 0b111, 0b1111000


def share_of_same(got: Tensor, want: Tensor) -> float:
    """Compares 8-bit values; of fp8 in the interpreter only those that it rounds: no powers of two, no subnormals."""
    comparable = torch.ones_like(want, dtype=torch.bool)
    if want.dtype.is_floating_point and want.device.type == "cpu":
        bits = want.view(torch.uint8)
        comparable = (bits & MANTISSA != 0) & (bits & EXPONENT != 0)
        assert comparable.float().mean() > 0.5
    return float((got.float() == want.float())[comparable].float().mean())


def build(device: torch.device, quantization: str | None) -> GlmImageTransformer2DModel:
    transformer = empty_transformer()
    if quantization:
        opened = open_device(f"{device.type}:0" if device.type == "cuda" else "cpu")
        for owner, name in (place for block in transformer.transformer_blocks for place in block_linears(block)):
            # The reference of fp8 runs on the CPU as well, where a configuration may not ask for it.
            setattr(owner, name, QuantizedLinear(getattr(owner, name), quantization, opened))
    fill(transformer, LargeTensors(device, torch.bfloat16))
    return transformer


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)


@pytest.mark.parametrize("quantization", DTYPES)
@pytest.mark.parametrize("text_tokens", [(6, 1), (0,)])
def test_blocks_match_diffusers_with_the_same_layers(
    device: torch.device, text_tokens: tuple[int, ...], quantization: str
) -> None:
    transformer = build(device, quantization)
    given = arguments(transformer, device, text_tokens)
    with torch.inference_mode():
        exact = eager_blocks(build(device, None))(*given)
        want = eager_blocks(transformer)(*given)
        got = FusedBlocks(transformer)(*given)
    assert change_error(got, want, given[0]) < MOST_ERROR[quantization]
    assert 0 < change_error(got, exact, given[0]) < MOST_ERROR[quantization]


@pytest.mark.parametrize("quantization", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_quantized_rows_match_plain_torch(device: torch.device, quantization: str, gelu: bool) -> None:
    hidden = normal(device, 5, 40) * 3
    hidden[2] = 0
    got = quantize_rowwise(hidden, DTYPES[quantization], gelu=gelu)
    want = quantize_rows(F.gelu(hidden, approximate="tanh") if gelu else hidden, DTYPES[quantization])
    torch.testing.assert_close(got.scales, want.scales, rtol=1e-6, atol=0)
    # The two GELUs may be rounded to different bf16 values; the interpreter rounds halves of fp8 up, and a GPU divides
    # by the scale less exactly.
    assert share_of_same(got.values, want.values) >= (0.95 if gelu or quantization == "fp8" else 0.99)


@pytest.mark.parametrize("quantization", DTYPES)
def test_modulated_norm_writes_quantized_rows(device: torch.device, quantization: str) -> None:
    residual, table = normal(device, 7, 48), normal(device, 12 * 48)
    plain, rounded = torch.empty_like(residual), empty_rows(residual, DTYPES[quantization])
    for out in (plain, rounded):
        modulated_norm(residual, table, out, 1e-5, (2, 7, 0), SHIFT_MLP, SCALE_MLP)
    want = quantize_rows(plain, DTYPES[quantization])
    assert share_of_same(rounded.values, want.values) >= (0.95 if quantization == "fp8" else 0.99)
    torch.testing.assert_close(rounded.scales, want.scales, rtol=1e-6, atol=0)


def test_int8_sums_become_the_layers_result(device: torch.device) -> None:
    rows, weight = (quantize_rows(normal(device, *shape), torch.int8) for shape in ((5, 32), (48, 32)))
    bias = normal(device, 48)
    sums = int8_sums(rows.values, weight.values)
    exact = (rows.values.float() * rows.scales) @ (weight.values.float() * weight.scales).T + bias.float()
    got = sums_to_bf16(sums, rows, weight, bias)
    assert relative_error(got, exact) < 1e-2
    assert relative_error(scaled_product(rows, weight, bias, torch.float32), exact) < 1e-5
    then = sums_in_8_bits(sums, rows, weight, bias)
    expected = quantize_rowwise(got, torch.int8, gelu=True)
    assert isinstance(then, QuantizedRows)
    assert torch.equal(then.values, expected.values)
    assert torch.equal(then.scales, expected.scales)

"""The fused blocks in 8 bits against diffusers' own blocks with the same layers in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import GlmImageTransformer2DModel
from torch import Tensor

from glm_image.checkpoint import RandomTensors, fill
from glm_image.devices import open_device
from glm_image.devices.quantized import DTYPES, Rows, int8_sums, quantize_rows, scaled_product
from glm_image.dit.blocks import eager_blocks
from glm_image.dit.quantized import QuantizedLinear, block_linears
from glm_image.kernels.dit_blocks import FusedBlocks
from glm_image.kernels.modulated_norm import SCALE_MLP, SHIFT_MLP, modulated_norm
from glm_image.kernels.rows import empty_rows, in_8_bits, sums_in_8_bits, sums_to_bf16

GRID = (4, 6)
HEADS, HEAD_DIM = 3, 32
WIDTH = HEADS * HEAD_DIM
# Of the blocks with bf16 layers they are further off: what is compared is rounded at the same places.
ERROR_OF_TWINS = {"int8": 0.02, "fp8": 0.03}
MANTISSA, EXPONENT = 0b111, 0b1111000
ERROR_OF_ROUNDING = {"int8": 0.03, "fp8": 0.06}


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def share_of_same(got: Tensor, want: Tensor) -> float:
    """Compares 8-bit values; of fp8 in the interpreter only what it can round: no powers of two, nothing subnormal."""
    comparable = torch.ones_like(want, dtype=torch.bool)
    if want.dtype.is_floating_point and want.device.type == "cpu":
        bits = want.view(torch.uint8)
        comparable = (bits & MANTISSA != 0) & (bits & EXPONENT != 0)
        assert comparable.float().mean() > 0.5
    return float((got.float() == want.float())[comparable].float().mean())


def build(device: torch.device, quantization: str | None) -> GlmImageTransformer2DModel:
    with torch.device("meta"):
        transformer = GlmImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            text_embed_dim=24,
            time_embed_dim=32,
            condition_dim=16,
            prior_vq_quantizer_codebook_size=64,
        )
    if quantization:
        opened = open_device(f"{device.type}:0" if device.type == "cuda" else "cpu")
        for owner, name in (place for block in transformer.transformer_blocks for place in block_linears(block)):
            # The twin of fp8 runs on the CPU as well, where a configuration may not ask for it.
            setattr(owner, name, QuantizedLinear(getattr(owner, name), quantization, opened))
    fill(transformer, RandomTensors(device, torch.bfloat16))
    return transformer


def drawn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)


@pytest.mark.parametrize("quantization", DTYPES)
@pytest.mark.parametrize("text_tokens", [(6, 1), (0,)])
def test_the_blocks_are_those_of_diffusers_with_the_same_layers(
    device: torch.device, text_tokens: tuple[int, ...], quantization: str
) -> None:
    transformer = build(device, quantization)
    sequences = [(drawn(device, 1, GRID[0] * GRID[1], WIDTH), drawn(device, 1, n, WIDTH)) for n in text_tokens]
    cos, sin = transformer.rope(torch.empty(1, 1, GRID[0] * 2, GRID[1] * 2))
    given = (sequences, drawn(device, 1, 32), (cos.to(device), sin.to(device)))
    with torch.inference_mode():
        exact = eager_blocks(build(device, None))(*given)
        want = eager_blocks(transformer)(*given)
        got = FusedBlocks(transformer)(*given)
    for ours, theirs, unrounded in zip(got, want, exact, strict=True):
        assert apart(ours, theirs) < ERROR_OF_TWINS[quantization]
        assert 0 < apart(ours, unrounded) < ERROR_OF_ROUNDING[quantization]


@pytest.mark.parametrize("quantization", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_rows_are_rounded_as_their_twin_rounds_them(device: torch.device, quantization: str, gelu: bool) -> None:
    hidden = drawn(device, 5, 40) * 3
    hidden[2] = 0
    got = in_8_bits(hidden, DTYPES[quantization], gelu=gelu)
    want = quantize_rows(F.gelu(hidden, approximate="tanh") if gelu else hidden, DTYPES[quantization])
    torch.testing.assert_close(got.scales, want.scales, rtol=1e-6, atol=0)
    # bf16 may round the GELU of the two ways to different sides; the interpreter rounds the half of fp8 up, and a GPU
    # divides by the scale in its own way.
    assert share_of_same(got.values, want.values) >= (0.95 if gelu or quantization == "fp8" else 0.99)


@pytest.mark.parametrize("quantization", DTYPES)
def test_the_modulated_norm_writes_rounded_rows(device: torch.device, quantization: str) -> None:
    residual, table = drawn(device, 7, 48), drawn(device, 12 * 48)
    plain, rounded = torch.empty_like(residual), empty_rows(residual, DTYPES[quantization])
    for out in (plain, rounded):
        modulated_norm(residual, table, out, 1e-5, (2, 7, 0), SHIFT_MLP, SCALE_MLP)
    want = quantize_rows(plain, DTYPES[quantization])
    assert share_of_same(rounded.values, want.values) >= (0.95 if quantization == "fp8" else 0.99)
    torch.testing.assert_close(rounded.scales, want.scales, rtol=1e-6, atol=0)


def test_sums_of_int8_become_what_the_layer_gives(device: torch.device) -> None:
    rows, weight = (quantize_rows(drawn(device, *shape), torch.int8) for shape in ((5, 32), (48, 32)))
    bias = drawn(device, 48)
    sums = int8_sums(rows.values, weight.values)
    exact = (rows.values.float() * rows.scales) @ (weight.values.float() * weight.scales).T + bias.float()
    got = sums_to_bf16(sums, rows, weight, bias)
    assert apart(got, exact) < 1e-2
    assert apart(scaled_product(rows, weight, bias, torch.float32), exact) < 1e-5
    then = sums_in_8_bits(sums, rows, weight, bias)
    twin = in_8_bits(got, torch.int8, gelu=True)
    assert isinstance(then, Rows)
    assert torch.equal(then.values, twin.values)
    assert torch.equal(then.scales, twin.scales)

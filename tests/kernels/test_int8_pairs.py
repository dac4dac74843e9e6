"""Activations as int8 pairs, and their products with int8 weights, against exact arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glm_image.devices.int8_linear import Int8Linear
from glm_image.devices.quantization import dequantized_product
from glm_image.kernels.int8_pairs import Int8Pairs, quantize_pairs
from glm_image.kernels.residual_norm import embed_norm, residual_norm
from glm_image.kernels.skinny_linear import TileConfig, gate_up, linear_partials
from kernels.sizes import BF16_ERROR, relative_error

TILES = TileConfig(block_n=32, block_k=32, split_k=1, warps=4, stages=2, fetch=16)
PAIR_ERROR = 1e-4
"""Of rows of normally distributed numbers; their rounding to bf16 costs 1.7e-3."""


def rows_of(device: torch.device, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(device, torch.bfloat16)


def quantized(x: Tensor) -> Int8Pairs:
    pairs = Int8Pairs.empty(*x.shape, x.device)
    quantize_pairs(x, pairs)
    return pairs


def dequantized(pairs: Int8Pairs) -> Tensor:
    high, low = pairs.values.float().unbind(1)
    return pairs.scale[:, None] * (128 * high + low)


def int8_linear(device: torch.device, n: int, k: int) -> Int8Linear:
    torch.manual_seed(n)
    linear = torch.nn.Linear(k, n, bias=False)
    return Int8Linear(linear.to(device, torch.bfloat16), dequantized_product)


def exact_product(x: Int8Pairs, linear: Int8Linear) -> Tensor:
    return dequantized(x).double() @ (linear.weight.double() * linear.scale.double()[:, None]).T


@pytest.mark.parametrize("width", [16, 97, 1000])
def test_quantized_pairs_match_plain_torch(device: torch.device, width: int) -> None:
    x = rows_of(device, 5, width)
    x[1] = 0
    x[2, 0] = 1e4
    x[3] *= 1e-30
    pairs, reference = quantized(x), Int8Pairs.of(x)
    # The kernel divides less exactly, so a value half-way between two may be rounded to the other.
    apart = (dequantized(pairs) - dequantized(reference)).abs().amax(dim=1)
    assert (apart <= 1.01 * reference.scale).all()
    largest = x.float().abs().amax(dim=1)
    assert ((dequantized(pairs) - x.float()).abs().amax(dim=1) <= largest * 2**-14.9).all()
    assert relative_error(dequantized(pairs)[4], x[4]) < PAIR_ERROR
    assert not pairs.values[1].any()


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize(("rows", "n", "k"), [(8, 96, 64), (5, 100, 200), (1, 33, 97), (13, 64, 128)])
def test_products_of_pairs_are_exact(device: torch.device, rows: int, n: int, k: int, split_k: int) -> None:
    linear, x = int8_linear(device, n, k), quantized(rows_of(device, rows, k))
    out = torch.full((split_k, rows, n), torch.nan, device=device)
    tiles = TileConfig(block_n=32, block_k=32, split_k=split_k, warps=4, stages=2, fetch=16)
    linear_partials(x, linear.weight, linear.scale, out, tiles)
    assert relative_error(out.sum(0), exact_product(x, linear)) < 1e-6


def test_largest_products_do_not_overflow(device: torch.device) -> None:
    k = 13696
    linear = int8_linear(device, 16, k)
    linear.weight.fill_(-127)
    x = quantized(torch.full((2, k), 3.0, device=device, dtype=torch.bfloat16))
    out = torch.empty(1, 2, 16, device=device)
    tiles = TileConfig(block_n=16, block_k=2048, split_k=1, warps=4, stages=1, fetch=0)
    linear_partials(x, linear.weight, linear.scale, out, tiles)
    assert relative_error(out[0], exact_product(x, linear)) < 1e-6


def test_gate_up_of_pairs_matches_plain_torch(device: torch.device) -> None:
    linear, x = int8_linear(device, 2 * 40, 96), quantized(rows_of(device, 8, 96))
    out = torch.full((8, 40), torch.nan, device=device, dtype=torch.bfloat16)
    gate_up(x, linear.weight, linear.scale, out, TILES)
    gate, up = exact_product(x, linear).chunk(2, dim=-1)
    assert relative_error(out, up * F.silu(gate)) < BF16_ERROR


def test_norms_write_pairs(device: torch.device) -> None:
    rows, width, eps = 5, 96, 1e-5
    weights, table = rows_of(device, 2, width), rows_of(device, 7, width)
    tokens = torch.tensor([3, 0, 6, 6, 1], device=device)
    whole, pairs = torch.empty(rows, width, device=device, dtype=torch.bfloat16), Int8Pairs.empty(rows, width, device)
    branch = rows_of(device, rows, width).float()[None]
    residual, same = torch.empty(2, rows, width, device=device, dtype=torch.bfloat16)
    embed_norm(tokens, table, weights[0], residual, whole, eps)
    embed_norm(tokens, table, weights[0], same, pairs, eps)
    assert relative_error(dequantized(pairs), whole) < PAIR_ERROR
    residual_norm(branch, residual, weights[0], weights[1], whole, eps)
    residual_norm(branch, same, weights[0], weights[1], pairs, eps)
    assert relative_error(dequantized(pairs), whole) < PAIR_ERROR
    assert torch.equal(residual, same)

"""Activations in two int8 parts, and products of int8 weights by them, against exact arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glm_image.devices.int8_linear import Int8Linear
from glm_image.devices.quantization import dequantized_product
from glm_image.kernels.residual_norm import embed_norm, residual_norm
from glm_image.kernels.skinny_linear import TileConfig, gate_up, linear_partials
from glm_image.kernels.split_rows import SplitRows, split_rows
from kernels.sizes import BF16_ERROR, relative_error

PLAN = TileConfig(block_n=32, block_k=32, splits=1, warps=4, stages=2, fetch=16)
SPLIT_ERROR = 1e-4
"""Of rows of normal numbers; their own rounding to bf16 is at 1.7e-3."""


def rows_of(device: torch.device, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(device, torch.bfloat16)


def split(x: Tensor) -> SplitRows:
    parts = SplitRows.empty(*x.shape, x.device)
    split_rows(x, parts)
    return parts


def int8_linear(device: torch.device, n: int, k: int) -> Int8Linear:
    torch.manual_seed(n)
    linear = torch.nn.Linear(k, n, bias=False)
    return Int8Linear(linear.to(device, torch.bfloat16), dequantized_product)


def exact_product(x: SplitRows, linear: Int8Linear) -> Tensor:
    return x.joined().double() @ (linear.weight.double() * linear.scale.double()[:, None]).T


@pytest.mark.parametrize("width", [16, 97, 1000])
def test_rows_are_split_as_in_plain_torch(device: torch.device, width: int) -> None:
    x = rows_of(device, 5, width)
    x[1] = 0
    x[2, 0] = 1e4
    x[3] *= 1e-30
    parts, twin = split(x), SplitRows.of(x)
    # The kernel divides less exactly, so a value between two may fall to the other.
    apart = (parts.joined() - twin.joined()).abs().amax(dim=1)
    assert (apart <= 1.01 * twin.scale).all()
    largest = x.float().abs().amax(dim=1)
    assert ((parts.joined() - x.float()).abs().amax(dim=1) <= largest * 2**-14.9).all()
    assert relative_error(parts.joined()[4], x[4]) < SPLIT_ERROR
    assert not parts.parts[1].any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("rows", "n", "k"), [(8, 96, 64), (5, 100, 200), (1, 33, 97), (13, 64, 128)])
def test_products_add_up_exactly(device: torch.device, rows: int, n: int, k: int, splits: int) -> None:
    linear, x = int8_linear(device, n, k), split(rows_of(device, rows, k))
    out = torch.full((splits, rows, n), torch.nan, device=device)
    plan = TileConfig(block_n=32, block_k=32, splits=splits, warps=4, stages=2, fetch=16)
    linear_partials(x, linear, out, plan)
    assert relative_error(out.sum(0), exact_product(x, linear)) < 1e-6


def test_the_largest_numbers_do_not_overflow(device: torch.device) -> None:
    k = 13696
    linear = int8_linear(device, 16, k)
    linear.weight.fill_(-127)
    x = split(torch.full((2, k), 3.0, device=device, dtype=torch.bfloat16))
    out = torch.empty(1, 2, 16, device=device)
    linear_partials(x, linear, out, TileConfig(block_n=16, block_k=2048, splits=1, warps=4, stages=1, fetch=0))
    assert relative_error(out[0], exact_product(x, linear)) < 1e-6


def test_gate_and_up_are_multiplied(device: torch.device) -> None:
    linear, x = int8_linear(device, 2 * 40, 96), split(rows_of(device, 8, 96))
    out = torch.full((8, 40), torch.nan, device=device, dtype=torch.bfloat16)
    gate_up(x, linear, out, PLAN)
    gate, up = exact_product(x, linear).chunk(2, dim=-1)
    assert relative_error(out, up * F.silu(gate)) < BF16_ERROR


def test_norms_split_what_they_write(device: torch.device) -> None:
    rows, width, eps = 5, 96, 1e-5
    weights, table = rows_of(device, 2, width), rows_of(device, 7, width)
    tokens = torch.tensor([3, 0, 6, 6, 1], device=device)
    whole, parts = torch.empty(rows, width, device=device, dtype=torch.bfloat16), SplitRows.empty(rows, width, device)
    branch = rows_of(device, rows, width).float()[None]
    residual, same = torch.empty(2, rows, width, device=device, dtype=torch.bfloat16)
    embed_norm(tokens, table, weights[0], residual, whole, eps)
    embed_norm(tokens, table, weights[0], same, parts, eps)
    assert relative_error(parts.joined(), whole) < SPLIT_ERROR
    residual_norm(branch, residual, weights[0], weights[1], whole, eps)
    residual_norm(branch, same, weights[0], weights[1], parts, eps)
    assert relative_error(parts.joined(), whole) < SPLIT_ERROR
    assert torch.equal(residual, same)

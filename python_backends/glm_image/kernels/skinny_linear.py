"""Linear layers of a few rows: all they cost is reading the weights once.

The weights' rows are the wide side of the tile, the few rows of the input its narrow side. Where a layer has too few
rows of weights to keep every multiprocessor reading, the reduction is split, and whatever comes next adds the parts up,
always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_image.devices.int8_linear import AnyLinear, Int8Linear
from glm_image.kernels.overlap import FETCH_UNIT, can_overlap, fetch, start_next, wait_for_previous
from glm_image.kernels.split_rows import STEP, SplitRows

ROWS = 16
"""The narrow side of a tile; the most rows an input may have."""


@dataclass(frozen=True)
class TileConfig:
    """How a linear is cut up.

    Attributes:
        block_n: rows of weights a program reads.
        block_k: columns it reads at a time.
        splits: programs that share a row of weights.
        warps: warps of a program.
        stages: tiles in flight.
        fetch: bytes of each row of weights that are brought into the cache ahead of the input.
    """

    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    fetch: int


@triton.jit
def _multiplied(w_tile, x_tile, sums, SPLIT: tl.constexpr):
    if not SPLIT:
        w_tile = w_tile.to(tl.bfloat16)
    return tl.dot(w_tile, x_tile, sums, out_dtype=sums.dtype)


@triton.jit
def _scaled(sums, x_scale_ptr, scale_ptr, at_n, n, rows, SPLIT: tl.constexpr, SCALED: tl.constexpr):
    # From what was summed up [weights' rows, columns of the tile] to the products [weights' rows, rows of the input].
    if SPLIT:
        high, low = tl.split(tl.reshape(sums, [sums.shape[0], sums.shape[1] // 2, 2]))
        at_m = tl.arange(0, sums.shape[1] // 2)
        x_scale = tl.load(x_scale_ptr + at_m, mask=at_m < rows, other=0.0)
        sums = (high.to(tl.float32) * STEP + low.to(tl.float32)) * x_scale[None, :]
    if SCALED:
        sums *= tl.load(scale_ptr + at_n, mask=at_n < n, other=0.0)[:, None]
    return sums


@triton.jit
def _linear_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, rows, n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROUND: tl.constexpr, SCALED: tl.constexpr, FETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    in_parts: tl.constexpr = COLUMNS != ROWS
    block, split = tl.program_id(0), tl.program_id(1)
    at_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    at_x = tl.arange(0, COLUMNS)
    at_k = tl.arange(0, BLOCK_K)
    tiles = tl.cdiv(k, BLOCK_K)
    share = tl.cdiv(tiles, SPLITS)
    weight = weight_ptr + at_n[:, None].to(tl.int64) * k + at_k[None, :]
    x = x_ptr + at_x[None, :] * k + at_k[:, None]
    sums = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.int32 if in_parts else tl.float32)
    fetch(weight_ptr + tl.minimum(at_n, n - 1).to(tl.int64) * k + split * share * BLOCK_K, FETCH, OVERLAP)
    wait_for_previous(OVERLAP)
    for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
        inside = tile * BLOCK_K + at_k < k
        w_tile = tl.load(
            weight + tile * BLOCK_K,
            mask=(at_n[:, None] < n) & inside[None, :], other=0, eviction_policy="evict_first",
        )  # fmt: skip
        x_tile = tl.load(x + tile * BLOCK_K, mask=(at_x[None, :] < rows * (COLUMNS // ROWS)) & inside[:, None], other=0)
        sums = _multiplied(w_tile, x_tile, sums, in_parts)
    start_next(OVERLAP)
    product = _scaled(sums, x_scale_ptr, scale_ptr, at_n, n, rows, in_parts, SCALED)
    if ROUND:
        product = product.to(tl.bfloat16).to(tl.float32)
    at_m = tl.arange(0, ROWS)
    out = out_ptr + (split * rows + at_m[None, :]) * n + at_n[:, None]
    tl.store(out, product, mask=(at_n[:, None] < n) & (at_m[None, :] < rows))


@triton.jit
def _gate_up_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, rows, n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr,
    FETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    in_parts: tl.constexpr = COLUMNS != ROWS
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_x = tl.arange(0, COLUMNS)
    at_k = tl.arange(0, BLOCK_K)
    gate = weight_ptr + at_n[:, None].to(tl.int64) * k + at_k[None, :]
    up = gate + n.to(tl.int64) * k
    x = x_ptr + at_x[None, :] * k + at_k[:, None]
    gate_sums = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.int32 if in_parts else tl.float32)
    up_sums = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.int32 if in_parts else tl.float32)
    first = weight_ptr + tl.minimum(at_n, n - 1).to(tl.int64) * k
    fetch(first, FETCH, OVERLAP)
    fetch(first + n.to(tl.int64) * k, FETCH, OVERLAP)
    wait_for_previous(OVERLAP)
    for tile in range(tl.cdiv(k, BLOCK_K)):
        inside = tile * BLOCK_K + at_k < k
        mask = (at_n[:, None] < n) & inside[None, :]
        gate_tile = tl.load(gate + tile * BLOCK_K, mask=mask, other=0, eviction_policy="evict_first")
        up_tile = tl.load(up + tile * BLOCK_K, mask=mask, other=0, eviction_policy="evict_first")
        x_tile = tl.load(x + tile * BLOCK_K, mask=(at_x[None, :] < rows * (COLUMNS // ROWS)) & inside[:, None], other=0)
        gate_sums = _multiplied(gate_tile, x_tile, gate_sums, in_parts)
        up_sums = _multiplied(up_tile, x_tile, up_sums, in_parts)
    start_next(OVERLAP)
    gated = _scaled(gate_sums, x_scale_ptr, scale_ptr, at_n, n, rows, in_parts, SCALED)
    raised = _scaled(up_sums, x_scale_ptr, scale_ptr + n, at_n, n, rows, in_parts, SCALED)
    # Rounded where the layer's own operators round.
    gated = gated.to(tl.bfloat16).to(tl.float32)
    silu = (gated * tl.sigmoid(gated)).to(tl.bfloat16).to(tl.float32)
    product = raised.to(tl.bfloat16).to(tl.float32) * silu
    at_m = tl.arange(0, ROWS)
    out = out_ptr + at_m[None, :] * n + at_n[:, None]
    tl.store(out, product.to(tl.bfloat16), mask=(at_n[:, None] < n) & (at_m[None, :] < rows))


def linear_partials(
    x: Tensor | SplitRows, linear: AnyLinear, out: Tensor, plan: TileConfig, *, rounded: bool = False
) -> None:
    """Multiplies ``x`` by a linear layer's matrix, in parts; its bias is left to what comes next.

    Args:
        x: bf16 [rows, k], at most ``ROWS`` rows; or split, where weights are int8.
        linear: bf16 or int8 weights [n, k].
        out: fp32 [plan.splits, rows, n]; the sum over the first dimension is the product.
        plan: how it is cut up.
        rounded: rounds each part to bf16, which is what ``nn.Linear`` returns where there is one part.
    """
    rows = out.shape[1]
    n, k = linear.weight.shape
    values, x_scale, tile_rows, columns = _tile_of(x, rows)
    scale = scale_of(linear)
    _linear_kernel[(triton.cdiv(n, plan.block_n), plan.splits)](
        values, x_scale, linear.weight, values if scale is None else scale, out, rows, n, k,
        plan.block_n, plan.block_k, plan.splits, tile_rows, columns, rounded, scale is not None,
        bytes_ahead(plan, linear.weight), can_overlap(),
        num_warps=plan.warps, num_stages=plan.stages, launch_pdl=can_overlap(),
    )  # fmt: skip


def gate_up(x: Tensor | SplitRows, linear: AnyLinear, out: Tensor, plan: TileConfig) -> None:
    """Computes ``up * silu(gate)``, gate and up being the two halves of what a linear layer gives.

    Args:
        x: bf16 [rows, k], at most ``ROWS`` rows; or split, where weights are int8.
        linear: bf16 or int8 weights [2 * n, k]: gate, then up; no bias.
        out: bf16 [rows, n].
        plan: how it is cut up; one split.
    """
    rows, n = out.shape
    k, scale = linear.weight.shape[1], scale_of(linear)
    values, x_scale, tile_rows, columns = _tile_of(x, rows)
    _gate_up_kernel[(triton.cdiv(n, plan.block_n),)](
        values, x_scale, linear.weight, values if scale is None else scale, out, rows, n, k,
        plan.block_n, plan.block_k, tile_rows, columns, scale is not None,
        bytes_ahead(plan, linear.weight), can_overlap(),
        num_warps=plan.warps, num_stages=plan.stages, launch_pdl=can_overlap(),
    )  # fmt: skip


def _tile_of(x: Tensor | SplitRows, rows: int) -> tuple[Tensor, Tensor, int, int]:
    # Values, scales, rows of the input on the tile's narrow side, and the columns that they take there.
    if isinstance(x, SplitRows):
        half = max(ROWS // 2, triton.next_power_of_2(rows))
        return x.parts, x.scale, half, 2 * half
    return x, x, ROWS, ROWS


def bytes_ahead(plan: TileConfig, weight: Tensor) -> int:
    """Returns how many bytes of each row of weights [n, k] may be fetched ahead: none beyond a row, 16 at a time."""
    k, row_bytes = weight.shape[1], weight.shape[1] * weight.element_size()
    if row_bytes % FETCH_UNIT:
        return 0
    share = triton.cdiv(triton.cdiv(k, plan.block_k), plan.splits) * plan.block_k
    last = max(0, k - share * (plan.splits - 1)) * weight.element_size()
    ahead: int = min(plan.fetch, last) // FETCH_UNIT * FETCH_UNIT
    return ahead


def scale_of(linear: AnyLinear) -> Tensor | None:
    """Returns the scales of int8 weights, None for bf16 ones."""
    return linear.scale if isinstance(linear, Int8Linear) else None


def partials_buffer(plan: TileConfig, rows: int, n: int, device: torch.device) -> Tensor:
    """Makes the fp32 [splits, rows, n] buffer ``linear_partials`` writes to."""
    return torch.empty(plan.splits, rows, n, device=device, dtype=torch.float32)

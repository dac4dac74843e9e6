"""Linear layers with few rows of input: their time is that of reading the weights once.

The rows of the weights are the wide side of a tile, the few rows of the input its narrow side. Where a layer has too
few rows of weights to keep every multiprocessor reading, the reduction is split (split-K), and the next kernel adds the
partial sums, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.int8_pairs import STEP, Int8Pairs
from glm_image.kernels.overlap import FETCH_UNIT, can_overlap, fetch, start_next, wait_for_previous

ROWS = 16
"""The narrow side of a tile, or the next power of two that holds the rows of the input; no bit depends on it."""


@dataclass(frozen=True)
class TileConfig:
    """How a linear layer is divided among programs.

    Attributes:
        block_n: rows of weights that a program reads.
        block_k: columns that it reads at a time.
        split_k: programs that share a row of weights.
        warps: warps of a program.
        stages: tiles in flight.
        fetch: bytes of each row of weights that are prefetched into the cache before the input is ready.
    """

    block_n: int
    block_k: int
    split_k: int
    warps: int
    stages: int
    fetch: int


@triton.jit
def _add_product(sums, w_tile, x_tile, INT8_PAIR: tl.constexpr):
    if not INT8_PAIR:
        w_tile = w_tile.to(tl.bfloat16)
    return tl.dot(w_tile, x_tile, sums, out_dtype=sums.dtype)


@triton.jit
def _products(
    weight, second_weight, x, offs_n, offs_x, offs_k, first_tile, end_tile, rows, n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Multiplies the input by one tile of weights' rows, or by two; sums are [BLOCK_N, COLUMNS]."""
    int8_pair: tl.constexpr = COLUMNS != ROWS
    sums = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.int32 if int8_pair else tl.float32)
    second_sums = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.int32 if int8_pair else tl.float32)
    for tile in range(first_tile, end_tile):
        in_k = tile * BLOCK_K + offs_k < k
        mask = (offs_n[:, None] < n) & in_k[None, :]
        w_tile = tl.load(weight + tile * BLOCK_K, mask=mask, other=0, eviction_policy="evict_first")
        if TWO:
            second_tile = tl.load(second_weight + tile * BLOCK_K, mask=mask, other=0, eviction_policy="evict_first")
        x_tile = tl.load(x + tile * BLOCK_K, mask=(offs_x[None, :] < rows * (COLUMNS // ROWS)) & in_k[:, None], other=0)
        sums = _add_product(sums, w_tile, x_tile, int8_pair)
        if TWO:
            second_sums = _add_product(second_sums, second_tile, x_tile, int8_pair)
    return sums, second_sums


@triton.jit
def _scaled(sums, x_scale_ptr, scale_ptr, offs_n, n, rows, INT8_PAIR: tl.constexpr, SCALED: tl.constexpr):
    """From sums [weights' rows, columns of the tile] to products [weights' rows, rows of the input], fp32."""
    if INT8_PAIR:
        high, low = tl.split(tl.reshape(sums, [sums.shape[0], sums.shape[1] // 2, 2]))
        offs_m = tl.arange(0, sums.shape[1] // 2)
        x_scale = tl.load(x_scale_ptr + offs_m, mask=offs_m < rows, other=0.0)
        sums = (high.to(tl.float32) * STEP + low.to(tl.float32)) * x_scale[None, :]
    if SCALED:
        sums *= tl.load(scale_ptr + offs_n, mask=offs_n < n, other=0.0)[:, None]
    return sums


@triton.jit
def _linear_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, rows, n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROUND: tl.constexpr, SCALED: tl.constexpr, FETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_x = tl.arange(0, COLUMNS)
    offs_k = tl.arange(0, BLOCK_K)
    tiles = tl.cdiv(k, BLOCK_K)
    share = tl.cdiv(tiles, SPLIT_K)
    weight = weight_ptr + offs_n[:, None].to(tl.int64) * k + offs_k[None, :]
    x = x_ptr + offs_x[None, :] * k + offs_k[:, None]
    fetch(weight_ptr + tl.minimum(offs_n, n - 1).to(tl.int64) * k + split * share * BLOCK_K, FETCH, OVERLAP)
    wait_for_previous(OVERLAP)
    sums, _ = _products(
        weight, weight, x, offs_n, offs_x, offs_k, split * share, tl.minimum((split + 1) * share, tiles), rows, n, k,
        BLOCK_N, BLOCK_K, ROWS, COLUMNS, False,
    )  # fmt: skip
    start_next(OVERLAP)
    product = _scaled(sums, x_scale_ptr, scale_ptr, offs_n, n, rows, COLUMNS != ROWS, SCALED)
    if ROUND:
        product = product.to(tl.bfloat16).to(tl.float32)
    offs_m = tl.arange(0, ROWS)
    out = out_ptr + (split * rows + offs_m[None, :]) * n + offs_n[:, None]
    tl.store(out, product, mask=(offs_n[:, None] < n) & (offs_m[None, :] < rows))


@triton.jit
def _gate_up_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, rows, n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr,
    FETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_x = tl.arange(0, COLUMNS)
    offs_k = tl.arange(0, BLOCK_K)
    gate = weight_ptr + offs_n[:, None].to(tl.int64) * k + offs_k[None, :]
    up = gate + n.to(tl.int64) * k
    x = x_ptr + offs_x[None, :] * k + offs_k[:, None]
    first = weight_ptr + tl.minimum(offs_n, n - 1).to(tl.int64) * k
    fetch(first, FETCH, OVERLAP)
    fetch(first + n.to(tl.int64) * k, FETCH, OVERLAP)
    wait_for_previous(OVERLAP)
    gate_sums, up_sums = _products(
        gate, up, x, offs_n, offs_x, offs_k, 0, tl.cdiv(k, BLOCK_K), rows, n, k, BLOCK_N, BLOCK_K, ROWS, COLUMNS, True
    )
    start_next(OVERLAP)
    gate_product = _scaled(gate_sums, x_scale_ptr, scale_ptr, offs_n, n, rows, COLUMNS != ROWS, SCALED)
    up_product = _scaled(up_sums, x_scale_ptr, scale_ptr + n, offs_n, n, rows, COLUMNS != ROWS, SCALED)
    # Rounded where torch's operators round.
    gate_product = gate_product.to(tl.bfloat16).to(tl.float32)
    silu = (gate_product * tl.sigmoid(gate_product)).to(tl.bfloat16).to(tl.float32)
    product = up_product.to(tl.bfloat16).to(tl.float32) * silu
    offs_m = tl.arange(0, ROWS)
    out = out_ptr + offs_m[None, :] * n + offs_n[:, None]
    tl.store(out, product.to(tl.bfloat16), mask=(offs_n[:, None] < n) & (offs_m[None, :] < rows))


def linear_partials(
    x: Tensor | Int8Pairs,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    tiles: TileConfig,
    *,
    rounded: bool = False,
) -> None:
    """Multiplies ``x`` by a matrix, in partial sums; a bias is left to the next kernel.

    Args:
        x: bf16 [rows, k], few rows; or int8 pairs, for int8 weights.
        weight: bf16 or int8 [n, k].
        scale: fp32 [n], by which rows of int8 weights are multiplied; None for bf16 weights.
        out: fp32 [tiles.split_k, rows, n]; the sum over the first dimension is the product.
        tiles: how the matrix is divided.
        rounded: rounds each partial sum to bf16; with one of them that is the result of ``nn.Linear``.
    """
    rows = out.shape[1]
    n, k = weight.shape
    values, x_scale, tile_rows, columns = _input_tile(x, rows)
    _linear_kernel[(triton.cdiv(n, tiles.block_n), tiles.split_k)](
        values, x_scale, weight, values if scale is None else scale, out, rows, n, k,
        tiles.block_n, tiles.block_k, tiles.split_k, tile_rows, columns, rounded, scale is not None,
        prefetch_bytes(tiles, weight), can_overlap(),
        num_warps=tiles.warps, num_stages=tiles.stages, launch_pdl=can_overlap(),
    )  # fmt: skip


def gate_up(x: Tensor | Int8Pairs, weight: Tensor, scale: Tensor | None, out: Tensor, tiles: TileConfig) -> None:
    """Computes ``up * silu(gate)``, where gate and up are the halves of the product of ``x`` and a matrix.

    The arguments are those of ``linear_partials``, but ``weight`` is [2 * n, k]: gate, then up; ``out`` is bf16
    [rows, n]; and ``tiles`` has no split-K.
    """
    rows, n = out.shape
    k = weight.shape[1]
    values, x_scale, tile_rows, columns = _input_tile(x, rows)
    _gate_up_kernel[(triton.cdiv(n, tiles.block_n),)](
        values, x_scale, weight, values if scale is None else scale, out, rows, n, k,
        tiles.block_n, tiles.block_k, tile_rows, columns, scale is not None,
        prefetch_bytes(tiles, weight), can_overlap(),
        num_warps=tiles.warps, num_stages=tiles.stages, launch_pdl=can_overlap(),
    )  # fmt: skip


def _input_tile(x: Tensor | Int8Pairs, rows: int) -> tuple[Tensor, Tensor, int, int]:
    """Returns values, scales, rows of the input on the tile's narrow side, and the columns that these take there."""
    if isinstance(x, Int8Pairs):
        half = max(ROWS // 2, triton.next_power_of_2(rows))
        return x.values, x.scale, half, 2 * half
    tile_rows = max(ROWS, triton.next_power_of_2(rows))
    return x, x, tile_rows, tile_rows


def prefetch_bytes(tiles: TileConfig, weight: Tensor) -> int:
    """Returns how many bytes of each row of weights [n, k] may be prefetched: within the row, a multiple of 16."""
    k, row_bytes = weight.shape[1], weight.shape[1] * weight.element_size()
    if row_bytes % FETCH_UNIT:
        return 0
    share = triton.cdiv(triton.cdiv(k, tiles.block_k), tiles.split_k) * tiles.block_k
    last = max(0, k - share * (tiles.split_k - 1)) * weight.element_size()
    ahead: int = min(tiles.fetch, last) // FETCH_UNIT * FETCH_UNIT
    return ahead


def partials_buffer(tiles: TileConfig, rows: int, n: int, device: torch.device) -> Tensor:
    """Allocates the output of ``linear_partials``, fp32 [tiles.split_k, rows, n]."""
    return torch.empty(tiles.split_k, rows, n, device=device, dtype=torch.float32)

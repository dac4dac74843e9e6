"""Attention of several new tokens per slot, each at its own position: the tokens of a speculative step.

A row has the bits that ``kernels.decode_attention`` gives it alone, whatever its place in the window: both have the
order of sums of ``kernels.attention_tiles``. Keys and values are written first, so that a row sees the rows before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.attention_tiles import (
    GROUP_SHARES,
    SHARES,
    TILE,
    attend_tile,
    merged,
    projected,
    rotary_factors,
    rotated,
)
from glm_image.kernels.decode_attention import combine, empty_parts
from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous

HEADS_BLOCK = 4
"""Heads that a program projects."""


@dataclass(frozen=True)
class WindowTiles:
    """How the attention of a window is divided among programs; no bit depends on it.

    Attributes:
        rows: consecutive rows of one slot that a program attends with, a power of two.
        grouped: whether a program sums a whole group of shares, so that fewer parts are written.
        warps: warps of a program.
    """

    rows: int
    grouped: bool
    warps: int


@triton.jit
def _project_kernel(
    partials_ptr, bias_ptr, cos_ptr, sin_ptr, slots_ptr, positions_ptr, query_ptr, keys_ptr, values_ptr, rows, positions,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds biases and rotates; writes a row's queries, and its keys and values to the cache."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    position = tl.load(positions_ptr + row).to(tl.int32)
    if position >= 0:
        slot = tl.load(slots_ptr + row).to(tl.int32)
        dim = tl.arange(0, DIM)
        partner, cos, sin = rotary_factors(cos_ptr, sin_ptr, (slot * positions + position) * ROTARY, dim, ROTARY)
        mask = (head < HEADS + 2 * KV_HEADS) & (dim[None, :] < DIM)
        plain = projected(
            partials_ptr, bias_ptr, head * DIM + dim[None, :], rows, width, row, mask, SPLIT_K, HAS_BIAS
        )
        other = projected(
            partials_ptr, bias_ptr, head * DIM + partner[None, :], rows, width, row, mask, SPLIT_K, HAS_BIAS
        )
        turned = rotated(plain, other, cos[None, :], sin[None, :])
        tl.store(query_ptr + (row * HEADS + head) * DIM + dim[None, :], turned, mask=mask & (head < HEADS))
        kv_head = tl.where(head < HEADS + KV_HEADS, head - HEADS, head - HEADS - KV_HEADS)
        at = ((slot * KV_HEADS + kv_head).to(tl.int64) * positions + position) * DIM + dim[None, :]
        is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
        tl.store(keys_ptr + at, turned, mask=mask & is_key)
        tl.store(values_ptr + at, plain.to(tl.bfloat16), mask=mask & (head >= HEADS + KV_HEADS))


@triton.jit
def _sum_share(
    query, keys_ptr, values_ptr, cache, dim, row_position, last, share, scale,
    M: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    running_max = tl.full([M], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([M], dtype=tl.float32)
    acc = tl.zeros([M, DIM], dtype=tl.float32)
    for tile in range(share, last // TILE + 1, SHARES):
        position = tile * TILE + tl.arange(0, TILE)
        offsets = cache + position[:, None] * DIM + dim[None, :]
        written = position[:, None] <= last
        keys = tl.load(keys_ptr + offsets, mask=written, other=0.0)
        values = tl.load(values_ptr + offsets, mask=written, other=0.0)
        visible = position[None, :] <= row_position[:, None]
        running_max, running_sum, acc = attend_tile(
            query, keys, values, visible, scale, running_max, running_sum, acc
        )
    return running_max, running_sum, acc


@triton.jit
def _attend_window_kernel(
    query_ptr, keys_ptr, values_ptr, slots_ptr, positions_ptr, acc_ptr, max_ptr, sum_ptr, positions, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SHARES: tl.constexpr, PART_SHARES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    kv_head = tl.program_id(0) % KV_HEADS
    first_row = tl.program_id(0) // KV_HEADS * ROWS
    part = tl.program_id(1)
    parts: tl.constexpr = SHARES // PART_SHARES
    m: tl.constexpr = ROWS * GROUP_BLOCK
    row = first_row + tl.arange(0, m) // GROUP_BLOCK
    group = tl.arange(0, m) % GROUP_BLOCK
    in_group = group < GROUP
    row_position = tl.load(positions_ptr + row).to(tl.int32)
    last = tl.max(row_position)
    slot = tl.load(slots_ptr + first_row).to(tl.int32)
    dim = tl.arange(0, DIM)
    used = in_group & (row_position >= 0)
    head = kv_head * GROUP + group
    query = tl.load(query_ptr + ((row * HEADS + head) * DIM)[:, None] + dim[None, :], mask=used[:, None], other=0.0)
    cache = (slot * KV_HEADS + kv_head).to(tl.int64) * positions * DIM
    all_max, all_sum, all_acc = _sum_share(
        query, keys_ptr, values_ptr, cache, dim, row_position, last, part * PART_SHARES, scale, m, DIM, TILE, SHARES
    )
    for share in tl.static_range(1, PART_SHARES):
        share_max, share_sum, acc = _sum_share(
            query, keys_ptr, values_ptr, cache, dim, row_position, last, part * PART_SHARES + share, scale,
            m, DIM, TILE, SHARES,
        )  # fmt: skip
        all_max, all_sum, old, new = merged(all_max, all_sum, share_max, share_sum)
        all_acc = tl.fma(all_acc, old[:, None], acc * new[:, None])
    out = ((row * KV_HEADS + kv_head) * parts + part) * GROUP + group
    tl.store(max_ptr + out, all_max, mask=in_group)
    tl.store(sum_ptr + out, all_sum, mask=in_group)
    tl.store(acc_ptr + out[:, None] * DIM + dim[None, :], all_acc, mask=in_group[:, None])


class WindowAttention:
    """Attention of the layers of a decoder, one after the other, over the same rows.

    ``head_dim`` is a power of two; the first ``rotary_dim`` channels of a head are rotated.
    """

    def __init__(
        self, rows: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, tiles: WindowTiles,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._rows, self._heads, self._kv_heads = rows, heads, kv_heads
        self._dim, self._rotary, self._tiles = head_dim, rotary_dim, tiles
        self._query = torch.empty(rows, heads, head_dim, device=device, dtype=torch.bfloat16)
        parts = SHARES // GROUP_SHARES if tiles.grouped else SHARES
        self._parts = empty_parts(rows, heads, kv_heads, head_dim, parts, device)

    def __call__(
        self,
        partials: Tensor,
        bias: Tensor | None,
        tables: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        slots: Tensor,
        positions: Tensor,
        out: Tensor,
    ) -> None:
        """Adds the rows' tokens to the cache and attends.

        Args:
            partials: fp32 [split_k, rows, (heads + 2 * kv_heads) * head_dim]: of q, k and v, without bias.
            bias: bf16 [(heads + 2 * kv_heads) * head_dim], or None.
            tables: cosines and sines, [slots, positions, rotary_dim] each.
            cache: the layer's keys and values, bf16 [slots, kv_heads, positions, head_dim] each.
            slots: int64 [rows], the rows' slots; ``WindowTiles.rows`` consecutive rows have the same.
            positions: int64 [rows], the rows' positions, which are consecutive within a slot; -1 for an unused row,
                whose result is not defined.
            out: bf16 [rows, heads * head_dim], written.
        """
        group, tiles = self._heads // self._kv_heads, self._tiles
        keys, values = cache
        heads = self._heads + 2 * self._kv_heads
        _project_kernel[(self._rows, triton.cdiv(heads, HEADS_BLOCK))](
            partials, partials if bias is None else bias, *tables, slots, positions, self._query, keys, values,
            self._rows, keys.shape[2], self._heads, self._kv_heads, self._dim, self._rotary, HEADS_BLOCK,
            partials.shape[0], bias is not None, can_overlap(), num_warps=4, launch_pdl=can_overlap(),
        )  # fmt: skip
        acc = self._parts[0]
        _attend_window_kernel[(self._rows // tiles.rows * self._kv_heads, acc.shape[1])](
            self._query, keys, values, slots, positions, *self._parts, keys.shape[2], self._dim**-0.5,
            self._heads, self._kv_heads, group, self._dim, max(16, triton.next_power_of_2(group)),
            tiles.rows, TILE, SHARES, GROUP_SHARES if tiles.grouped else 1, can_overlap(),
            num_warps=tiles.warps, num_stages=2, launch_pdl=can_overlap(),
        )  # fmt: skip
        combine(self._parts, out, self._heads, self._kv_heads)

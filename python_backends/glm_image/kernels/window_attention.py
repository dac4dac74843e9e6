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

GROUPED_ROWS = 64
"""Rows from which it is faster to write and merge fewer parts than to have more programs."""

HEADS_BLOCK = 4
"""Heads that a program projects."""

LARGEST = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class WindowTiles:
    """How the attention of a window is divided among programs; no bit depends on it.

    Attributes:
        rows: consecutive rows that a program attends with.
        part_shares: shares that a program merges, 1 or ``GROUP_SHARES``.
    """

    rows: int = 4
    part_shares: int = 1


@triton.jit
def _project_kernel(
    partials_ptr, bias_ptr, cos_ptr, sin_ptr, slots_ptr, positions_ptr, query_ptr, keys_ptr, values_ptr,
    rows, positions,
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
        plain = projected(partials_ptr, bias_ptr, head * DIM + dim[None, :], rows, width, row, mask, SPLIT_K, HAS_BIAS)
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
def _attend_tile_at(
    tile, keys_ptr, values_ptr, last, row_position, query, scale, running_max, running_sum, acc,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    position = tile * TILE + tl.arange(0, TILE)
    offsets = position[:, None] * DIM + tl.arange(0, DIM)[None, :]
    written = position[:, None] <= last
    keys = tl.load(keys_ptr + offsets, mask=written, other=0.0)
    values = tl.load(values_ptr + offsets, mask=written, other=0.0)
    visible = position[None, :] <= row_position[:, None]
    return attend_tile(query, keys, values, visible, scale, running_max, running_sum, acc)


@triton.jit
def _attend_window_kernel(
    query_ptr, keys_ptr, values_ptr, slots_ptr, positions_ptr, acc_ptr, max_ptr, sum_ptr, rows, positions, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SHARES: tl.constexpr, PART_SHARES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    kv_head, first_row = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS * ROWS
    part = tl.program_id(1)
    m: tl.constexpr = ROWS * GROUP_BLOCK
    row = first_row + tl.arange(0, m) // GROUP_BLOCK
    group = tl.arange(0, m) % GROUP_BLOCK
    is_head = (group < GROUP) & (row < rows)
    row_position = tl.load(positions_ptr + row, mask=row < rows, other=-1).to(tl.int32)
    used = is_head & (row_position >= 0)
    row_slot = tl.load(slots_ptr + row, mask=row < rows, other=0).to(tl.int32)
    dim = tl.arange(0, DIM)
    at = (row * HEADS + kv_head * GROUP + group) * DIM
    query = tl.load(query_ptr + at[:, None] + dim[None, :], mask=used[:, None], other=0.0)

    running_max = tl.full([m], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([m], dtype=tl.float32)
    acc = tl.zeros([m, DIM], dtype=tl.float32)
    if PART_SHARES > 1:
        part_max, part_sum, part_acc = running_max, running_sum, acc
    # A row takes no part in the tiles of other slots than its own: they leave its sums as they are.
    first_slot = tl.min(tl.where(row_position >= 0, row_slot, LARGEST))
    for slot in range(first_slot, tl.max(tl.where(row_position >= 0, row_slot, -1)) + 1):
        slot_position = tl.where(row_slot == slot, row_position, -1)
        last = tl.max(slot_position)
        cache = (slot * KV_HEADS + kv_head).to(tl.int64) * positions * DIM
        if PART_SHARES == 1:
            for tile in range(part, last // TILE + 1, SHARES):
                running_max, running_sum, acc = _attend_tile_at(
                    tile, keys_ptr + cache, values_ptr + cache, last, slot_position, query, scale, running_max,
                    running_sum, acc, DIM, TILE,
                )  # fmt: skip
        else:
            share_tiles = tl.cdiv(last // TILE + 1, SHARES)
            for step in range(PART_SHARES * share_tiles):
                tile = part * PART_SHARES + step // share_tiles + step % share_tiles * SHARES
                running_max, running_sum, acc = _attend_tile_at(
                    tile, keys_ptr + cache, values_ptr + cache, last, slot_position, query, scale, running_max,
                    running_sum, acc, DIM, TILE,
                )  # fmt: skip
                ends = step % share_tiles == share_tiles - 1
                new_max, new_sum, old, new = merged(part_max, part_sum, running_max, running_sum)
                part_acc = tl.where(ends, tl.fma(part_acc, old[:, None], acc * new[:, None]), part_acc)
                part_max, part_sum = tl.where(ends, new_max, part_max), tl.where(ends, new_sum, part_sum)
                running_max = tl.where(ends, float("-inf"), running_max)
                running_sum, acc = tl.where(ends, 0.0, running_sum), tl.where(ends, 0.0, acc)
    if PART_SHARES > 1:
        running_max, running_sum, acc = part_max, part_sum, part_acc
    out = ((row * KV_HEADS + kv_head) * (SHARES // PART_SHARES) + part) * GROUP + group
    tl.store(max_ptr + out, running_max, mask=is_head)
    tl.store(sum_ptr + out, running_sum, mask=is_head)
    tl.store(acc_ptr + out[:, None] * DIM + dim[None, :], acc, mask=is_head[:, None])


class WindowAttention:
    """Attention of the layers of a decoder, one after the other, over the same rows.

    ``head_dim`` is a power of two; the first ``rotary_dim`` channels of a head are rotated.
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        device: torch.device,
    ) -> None:
        self._rows, self._heads, self._kv_heads = rows, heads, kv_heads
        self._dim, self._rotary = head_dim, rotary_dim
        self._tiles = window_attention_tiles(rows)
        self._query = torch.empty(rows, heads, head_dim, device=device, dtype=torch.bfloat16)
        self._parts = empty_parts(rows, heads, kv_heads, head_dim, SHARES // self._tiles.part_shares, device)

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
            slots: int64 [rows], the rows' slots, in ascending order.
            positions: int64 [rows]: those of a slot are consecutive; -1 for an unused row, whose result is undefined.
            out: bf16 [rows, heads * head_dim], written.
        """
        group = self._heads // self._kv_heads
        keys, values = cache
        _project_kernel[(self._rows, triton.cdiv(self._heads + 2 * self._kv_heads, HEADS_BLOCK))](
            partials, partials if bias is None else bias, *tables, slots, positions, self._query, keys, values,
            self._rows, keys.shape[2], self._heads, self._kv_heads, self._dim, self._rotary, HEADS_BLOCK,
            partials.shape[0], bias is not None, can_overlap(), num_warps=4, launch_pdl=can_overlap(),
        )  # fmt: skip
        tiles = self._tiles
        _attend_window_kernel[(triton.cdiv(self._rows, tiles.rows) * self._kv_heads, SHARES // tiles.part_shares)](
            self._query, keys, values, slots, positions, *self._parts, self._rows, keys.shape[2], self._dim**-0.5,
            self._heads, self._kv_heads, group, self._dim, max(16, triton.next_power_of_2(group)),
            tiles.rows, TILE, SHARES, tiles.part_shares, can_overlap(),
            num_warps=4, num_stages=2, launch_pdl=can_overlap(),
        )  # fmt: skip
        combine(self._parts, out, self._heads, self._kv_heads)


def window_attention_tiles(rows: int) -> WindowTiles:
    """Returns the best tiles for a number of rows: of a sweep on an H200, at 664 and 1,100 positions."""
    if rows < GROUPED_ROWS:
        return WindowTiles()
    return WindowTiles(rows=2 if rows == GROUPED_ROWS else 4, part_shares=GROUP_SHARES)

"""Attention of one new token per slot: bias, rotary embedding, write to the cache and attention, in two passes.

The heads that share a KV head are the rows of one tile: the cache is read once. ``kernels.attention_tiles`` has the
order of sums.
"""

from __future__ import annotations

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
from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous


@triton.jit
def _attend_kernel(
    partials_ptr, bias_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, lengths_ptr, acc_ptr, max_ptr, sum_ptr,
    rows, positions, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr,
    SHARES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    pair, share = tl.program_id(0), tl.program_id(1)
    row, kv_head = pair // KV_HEADS, pair % KV_HEADS
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    length = tl.load(lengths_ptr + row).to(tl.int32)
    dim = tl.arange(0, DIM)
    group = tl.arange(0, GROUP_BLOCK)
    in_group = group < GROUP
    partner, cos, sin = rotary_factors(cos_ptr, sin_ptr, (row * positions + length) * ROTARY, dim, ROTARY)

    head = (kv_head * GROUP + group) * DIM
    mask = in_group[:, None] & (dim[None, :] < DIM)
    query = projected(partials_ptr, bias_ptr, head[:, None] + dim[None, :], rows, width, row, mask, SPLIT_K, HAS_BIAS)
    other = projected(
        partials_ptr, bias_ptr, head[:, None] + partner[None, :], rows, width, row, mask, SPLIT_K, HAS_BIAS
    )
    query = rotated(query, other, cos[None, :], sin[None, :])
    key_at = (HEADS + kv_head) * DIM
    new_key = projected(partials_ptr, bias_ptr, key_at + dim, rows, width, row, dim < DIM, SPLIT_K, HAS_BIAS)
    other_key = projected(partials_ptr, bias_ptr, key_at + partner, rows, width, row, dim < DIM, SPLIT_K, HAS_BIAS)
    new_key = rotated(new_key, other_key, cos, sin)
    value_at = (HEADS + KV_HEADS + kv_head) * DIM
    new_value = projected(partials_ptr, bias_ptr, value_at + dim, rows, width, row, dim < DIM, SPLIT_K, HAS_BIAS)
    new_value = new_value.to(tl.bfloat16)

    cache = (row * KV_HEADS + kv_head).to(tl.int64) * positions * DIM
    if (length // TILE) % SHARES == share:
        tl.store(keys_ptr + cache + length * DIM + dim, new_key)
        tl.store(values_ptr + cache + length * DIM + dim, new_value)

    running_max = tl.full([GROUP_BLOCK], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([GROUP_BLOCK], dtype=tl.float32)
    acc = tl.zeros([GROUP_BLOCK, DIM], dtype=tl.float32)
    for tile in range(share, length // TILE + 1, SHARES):
        position = tile * TILE + tl.arange(0, TILE)
        offsets = cache + position[:, None] * DIM + dim[None, :]
        stored = position[:, None] < length
        is_new = position[:, None] == length
        keys = tl.where(is_new, new_key[None, :], tl.load(keys_ptr + offsets, mask=stored, other=0.0))
        values = tl.where(is_new, new_value[None, :], tl.load(values_ptr + offsets, mask=stored, other=0.0))
        running_max, running_sum, acc = attend_tile(
            query, keys, values, position[None, :] <= length, scale, running_max, running_sum, acc
        )

    out = (pair * SHARES + share) * GROUP + group
    tl.store(max_ptr + out, running_max, mask=in_group)
    tl.store(sum_ptr + out, running_sum, mask=in_group)
    tl.store(acc_ptr + out[:, None] * DIM + dim[None, :], acc, mask=in_group[:, None])


@triton.jit
def _combine_kernel(
    acc_ptr, max_ptr, sum_ptr, out_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr,
    SHARE_GROUPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    dim = tl.arange(0, DIM)
    parts: tl.constexpr = PARTS // SHARE_GROUPS
    for share_group in tl.static_range(SHARE_GROUPS):
        first = ((row * KV_HEADS + head // GROUP) * PARTS + share_group * parts) * GROUP + head % GROUP
        group_max, group_sum = tl.load(max_ptr + first), tl.load(sum_ptr + first)
        group_acc = tl.load(acc_ptr + first * DIM + dim)
        for part in tl.static_range(1, parts):
            at = first + part * GROUP
            group_max, group_sum, old, new = merged(group_max, group_sum, tl.load(max_ptr + at), tl.load(sum_ptr + at))
            group_acc = tl.fma(group_acc, old, tl.load(acc_ptr + at * DIM + dim) * new)
        if share_group == 0:
            all_max, all_sum, acc = group_max, group_sum, group_acc
        else:
            all_max, all_sum, old, new = merged(all_max, all_sum, group_max, group_sum)
            acc = tl.fma(acc, old, group_acc * new)
    tl.store(out_ptr + (row * HEADS + head) * DIM + dim, (acc / all_sum).to(tl.bfloat16))


def combine(parts: tuple[Tensor, Tensor, Tensor], out: Tensor, heads: int, kv_heads: int) -> None:
    """Merges the parts of the softmaxes of all rows.

    Args:
        parts: from ``empty_parts``: the shares, or the groups of shares.
        out: bf16 [rows, heads * head_dim], written.
        heads: heads of the query.
        kv_heads: heads of the cache.
    """
    acc = parts[0]
    _combine_kernel[(out.shape[0] * heads,)](
        *parts, out, heads, kv_heads, heads // kv_heads, acc.shape[3], acc.shape[1], SHARES // GROUP_SHARES,
        can_overlap(), num_warps=1, launch_pdl=can_overlap(),
    )  # fmt: skip


def empty_parts(
    rows: int, heads: int, kv_heads: int, head_dim: int, parts: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates parts, fp32: weighted values [rows * kv_heads, parts, group, head_dim], maxima, sums [..., group]."""
    shape = (rows * kv_heads, parts, heads // kv_heads)
    maxima, sums = torch.empty(2, *shape, device=device)
    return torch.empty(*shape, head_dim, device=device), maxima, sums


class DecodeAttention:
    """Attention of the layers of a decoder, one after the other, over the same slots.

    ``head_dim`` is a power of two; the first ``rotary_dim`` channels of a head are rotated.
    """

    def __init__(
        self, slots: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, device: torch.device
    ) -> None:
        self._slots, self._heads, self._kv_heads = slots, heads, kv_heads
        self._dim, self._rotary = head_dim, rotary_dim
        self._parts = empty_parts(slots, heads, kv_heads, head_dim, SHARES, device)

    def __call__(
        self,
        partials: Tensor,
        bias: Tensor | None,
        tables: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        lengths: Tensor,
        out: Tensor,
    ) -> None:
        """Adds the new token to the cache and attends.

        Args:
            partials: fp32 [split_k, slots, (heads + 2 * kv_heads) * head_dim]: of q, k and v, without bias.
            bias: bf16 [(heads + 2 * kv_heads) * head_dim], or None.
            tables: cosines and sines, [slots, positions, rotary_dim] each.
            cache: the layer's keys and values, bf16 [slots, kv_heads, positions, head_dim] each.
            lengths: int64 [slots]: the position of the new token.
            out: bf16 [slots, heads * head_dim], written.
        """
        group = self._heads // self._kv_heads
        keys, values = cache
        _attend_kernel[(self._slots * self._kv_heads, SHARES)](
            partials, partials if bias is None else bias, *tables, keys, values, lengths,
            *self._parts, self._slots, keys.shape[2], self._dim**-0.5,
            self._heads, self._kv_heads, group, self._dim, self._rotary, max(16, triton.next_power_of_2(group)),
            partials.shape[0], bias is not None, TILE, SHARES, can_overlap(),
            num_warps=4, num_stages=2, launch_pdl=can_overlap(),
        )  # fmt: skip
        combine(self._parts, out, self._heads, self._kv_heads)

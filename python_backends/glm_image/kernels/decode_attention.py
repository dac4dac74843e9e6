"""Attention of one new token per slot: bias, rotary embedding, write to the cache and attention, in two passes.

The positions of a slot are distributed in tiles over a fixed number of programs, so the order of its sums depends on
its own length alone. The heads that share a KV head are the rows of one tile: the cache is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous

PROGRAMS = 16
"""Programs per slot and KV head."""

TILE = 64
"""Positions that a program reads at a time."""


@triton.jit
def _projected(partials_ptr, bias_ptr, offs, rows, width, row, mask, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Adds the partial sums of a projection in order to its bias, and rounds as torch's operator does."""
    if HAS_BIAS:
        sums = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        sums = tl.zeros_like(offs).to(tl.float32)
    for split in tl.static_range(SPLIT_K):
        sums += tl.load(partials_ptr + (split * rows + row) * width + offs, mask=mask, other=0.0)
    return sums.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _attend_kernel(
    partials_ptr, bias_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, lengths_ptr, acc_ptr, max_ptr, sum_ptr,
    rows, positions, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr,
    PROGRAMS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    pair, program = tl.program_id(0), tl.program_id(1)
    row, kv_head = pair // KV_HEADS, pair % KV_HEADS
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    length = tl.load(lengths_ptr + row).to(tl.int32)
    dim = tl.arange(0, DIM)
    group = tl.arange(0, GROUP_BLOCK)
    in_group = group < GROUP

    # Rotary embedding: channel d of the first half pairs with d + ROTARY / 2.
    rotary = dim < ROTARY
    partner = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim - ROTARY // 2)
    partner = tl.where(rotary, partner, dim)
    sign = tl.where(dim < ROTARY // 2, -1.0, 1.0)
    table = (row * positions + length) * ROTARY + dim
    cos = tl.load(cos_ptr + table, mask=rotary, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=rotary, other=0.0).to(tl.float32) * sign

    head = (kv_head * GROUP + group) * DIM
    mask = in_group[:, None] & (dim[None, :] < DIM)
    query = _projected(partials_ptr, bias_ptr, head[:, None] + dim[None, :], rows, width, row, mask, SPLIT_K, HAS_BIAS)
    other = _projected(
        partials_ptr, bias_ptr, head[:, None] + partner[None, :], rows, width, row, mask, SPLIT_K, HAS_BIAS
    )
    query = (query * cos[None, :] + other * sin[None, :]).to(tl.bfloat16)
    key_at = (HEADS + kv_head) * DIM
    new_key = _projected(partials_ptr, bias_ptr, key_at + dim, rows, width, row, dim < DIM, SPLIT_K, HAS_BIAS)
    other_key = _projected(partials_ptr, bias_ptr, key_at + partner, rows, width, row, dim < DIM, SPLIT_K, HAS_BIAS)
    new_key = (new_key * cos + other_key * sin).to(tl.bfloat16)
    value_at = (HEADS + KV_HEADS + kv_head) * DIM
    new_value = _projected(partials_ptr, bias_ptr, value_at + dim, rows, width, row, dim < DIM, SPLIT_K, HAS_BIAS)
    new_value = new_value.to(tl.bfloat16)

    cache = (row * KV_HEADS + kv_head).to(tl.int64) * positions * DIM
    if (length // TILE) % PROGRAMS == program:
        tl.store(keys_ptr + cache + length * DIM + dim, new_key)
        tl.store(values_ptr + cache + length * DIM + dim, new_value)

    running_max = tl.full([GROUP_BLOCK], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([GROUP_BLOCK], dtype=tl.float32)
    acc = tl.zeros([GROUP_BLOCK, DIM], dtype=tl.float32)
    for tile in range(program, length // TILE + 1, PROGRAMS):
        position = tile * TILE + tl.arange(0, TILE)
        offsets = cache + position[:, None] * DIM + dim[None, :]
        stored = position[:, None] < length
        is_new = position[:, None] == length
        keys = tl.where(is_new, new_key[None, :], tl.load(keys_ptr + offsets, mask=stored, other=0.0))
        values = tl.where(is_new, new_value[None, :], tl.load(values_ptr + offsets, mask=stored, other=0.0))
        scores = tl.dot(query, tl.trans(keys)) * scale
        scores = tl.where(position[None, :] <= length, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_max[:, None])
        rescale = tl.exp(running_max - new_max)
        running_sum = running_sum * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(tl.bfloat16), values)
        running_max = new_max

    out = (pair * PROGRAMS + program) * GROUP + group
    tl.store(max_ptr + out, running_max, mask=in_group)
    tl.store(sum_ptr + out, running_sum, mask=in_group)
    tl.store(acc_ptr + out[:, None] * DIM + dim[None, :], acc, mask=in_group[:, None])


@triton.jit
def _combine_kernel(
    acc_ptr, max_ptr, sum_ptr, out_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PROGRAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    pair = row * KV_HEADS + head // GROUP
    dim = tl.arange(0, DIM)
    offsets = (pair * PROGRAMS + tl.arange(0, PROGRAMS)) * GROUP + head % GROUP
    partial_max = tl.load(max_ptr + offsets)
    rescale = tl.exp(partial_max - tl.max(partial_max))
    total = tl.sum(rescale * tl.load(sum_ptr + offsets))
    acc = tl.load(acc_ptr + offsets[:, None] * DIM + dim[None, :])
    attended = tl.sum(acc * rescale[:, None], axis=0) / total
    tl.store(out_ptr + (row * HEADS + head) * DIM + dim, attended.to(tl.bfloat16))


class DecodeAttention:
    """Attention of the layers of a decoder, one after the other, over the same slots.

    ``head_dim`` is a power of two; the first ``rotary_dim`` channels of a head are rotated.
    """

    def __init__(
        self, slots: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, device: torch.device
    ) -> None:
        self._slots, self._heads, self._kv_heads = slots, heads, kv_heads
        self._dim, self._rotary = head_dim, rotary_dim
        shape = (slots * kv_heads, PROGRAMS, heads // kv_heads)
        self._max, self._sum = torch.empty(2, *shape, device=device)
        self._acc = torch.empty(*shape, head_dim, device=device)

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
        _attend_kernel[(self._slots * self._kv_heads, PROGRAMS)](
            partials, partials if bias is None else bias, *tables, keys, values, lengths,
            self._acc, self._max, self._sum, self._slots, keys.shape[2], self._dim**-0.5,
            self._heads, self._kv_heads, group, self._dim, self._rotary, max(16, triton.next_power_of_2(group)),
            partials.shape[0], bias is not None, TILE, PROGRAMS, can_overlap(),
            num_warps=4, num_stages=2, launch_pdl=can_overlap(),
        )  # fmt: skip
        _combine_kernel[(self._slots * self._heads,)](
            self._acc, self._max, self._sum, out, self._heads, self._kv_heads, group, self._dim, PROGRAMS,
            can_overlap(), num_warps=2, launch_pdl=can_overlap(),
        )  # fmt: skip

"""Parts of the attention of new tokens that do not depend on how many rows of queries a program has.

Attention of one row has a fixed order of sums. The positions up to the row's own are divided into tiles of ``TILE``;
tile t belongs to share ``t % SHARES``. Each share is summed in the order of its tiles; the shares are merged in order
within a group of ``GROUP_SHARES``, then the groups in order. So a row has the same bits however shares, groups and rows
are distributed among programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 64
"""Positions that are read at a time."""

SHARES = 16
GROUP_SHARES = 4
"""A share is a KV split of flash-decoding: positions that are summed apart and merged at the end."""

SUM_COLUMNS = tl.constexpr(16)
"""Columns of the narrowest matrix that the matrix instructions multiply by."""


@triton.jit
def projected(partials_ptr, bias_ptr, offs, rows, width, row, mask, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Adds the partial sums of a projection in order to its bias, and rounds as torch's operator does."""
    if HAS_BIAS:
        sums = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        sums = tl.zeros_like(offs).to(tl.float32)
    for split in tl.static_range(SPLIT_K):
        sums += tl.load(partials_ptr + (split * rows + row) * width + offs, mask=mask, other=0.0)
    return sums.to(tl.bfloat16).to(tl.float32)


@triton.jit
def rotated(values, partners, cos, sin):
    """Returns the rotary embedding, bf16; the multiply-add is explicit, so that every kernel rounds alike."""
    return tl.fma(values, cos, partners * sin).to(tl.bfloat16)


@triton.jit
def rotary_factors(cos_ptr, sin_ptr, table, dim, ROTARY: tl.constexpr):
    """Returns each channel's partner, cosine and signed sine: channel d pairs with d + ROTARY / 2."""
    rotary = dim < ROTARY
    partner = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim - ROTARY // 2)
    partner = tl.where(rotary, partner, dim)
    cos = tl.load(cos_ptr + table + dim, mask=rotary, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table + dim, mask=rotary, other=0.0).to(tl.float32)
    return partner, cos, tl.where(dim < ROTARY // 2, -sin, sin)


@triton.jit
def decay(old_max, new_max):
    """Returns exp(old_max - new_max), and 1 where both are -inf."""
    return tl.where(old_max == new_max, 1.0, tl.exp(old_max - new_max))


@triton.jit
def attend_tile(query, keys, values, visible, scale, running_max, running_sum, acc):
    """Adds a tile of positions to the running softmax of rows of queries.

    ``query`` is [rows, DIM], ``keys`` and ``values`` are [TILE, DIM], all bf16; ``visible`` is [rows, TILE]. The sum of
    the weights is a matrix product too: a reduction would add in an order that depends on the number of rows.
    """
    scores = tl.where(visible, tl.dot(query, tl.trans(keys)) * scale, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, axis=1))
    weights = tl.where(visible, tl.exp(scores - new_max[:, None]), 0.0).to(tl.bfloat16)
    rescale = decay(running_max, new_max)
    ones = tl.full([keys.shape[0], SUM_COLUMNS], 1.0, dtype=tl.float32).to(tl.bfloat16)
    tile_sum = tl.max(tl.dot(weights, ones), axis=1)
    running_sum = tl.fma(running_sum, rescale, tile_sum)
    acc = tl.dot(weights, values, acc * rescale[:, None])
    return new_max, running_sum, acc


@triton.jit
def merged(first_max, first_sum, second_max, second_sum):
    """Merges the maxima and sums of two softmaxes; also returns the factors of their weighted values."""
    new_max = tl.maximum(first_max, second_max)
    first, second = decay(first_max, new_max), decay(second_max, new_max)
    return new_max, tl.fma(first_sum, first, second_sum * second), first, second

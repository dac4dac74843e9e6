"""Kernels of the prefill: rotary embedding with the write to the cache, and the gated product of the MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS_PER_PROGRAM = 4
COLUMNS_PER_PROGRAM = 1024


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr, cos_ptr, sin_ptr, query_ptr, keys_ptr, values_ptr, positions,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    mask = (head < HEADS + 2 * KV_HEADS) & (dim < DIM)
    rotary = (dim < ROTARY) & (head < HEADS + KV_HEADS) & mask
    # Channel d of the first half pairs with d + ROTARY / 2.
    partner = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim - ROTARY // 2)
    row = qkv_ptr + token * (HEADS + 2 * KV_HEADS) * DIM + head * DIM
    own = tl.load(row + dim, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(row + partner, mask=rotary, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * ROTARY + dim, mask=rotary, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * ROTARY + dim, mask=rotary, other=0.0).to(tl.float32)
    sin = tl.where(dim < ROTARY // 2, -sin, sin)
    rotated = (own * cos + other * sin).to(tl.bfloat16)
    kv_head = (head - HEADS) % KV_HEADS
    offsets = (kv_head.to(tl.int64) * positions + token) * DIM + dim
    tl.store(query_ptr + token * HEADS * DIM + head * DIM + dim, rotated, mask=mask & (head < HEADS))
    tl.store(keys_ptr + offsets, rotated, mask=mask & (head >= HEADS) & (head < HEADS + KV_HEADS))
    tl.store(values_ptr + offsets, rotated, mask=mask & (head >= HEADS + KV_HEADS))


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates a prompt's queries and keys by their positions, and writes its keys and values from position 0.

    Args:
        qkv: bf16 [tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys and values, with their bias.
        cos: bf16 [tokens, rotary_dim].
        sin: as ``cos``.
        cache: the slot's keys and values of one layer, bf16 [kv_heads, positions, head_dim] each, contiguous.

    Returns:
        The rotated queries, bf16 [tokens, heads, head_dim].
    """
    keys, values = cache
    kv_heads, positions, dim = keys.shape
    tokens, width = qkv.shape
    heads = width // dim - 2 * kv_heads
    query = torch.empty(tokens, heads, dim, device=qkv.device, dtype=qkv.dtype)
    _rotate_and_store_kernel[(tokens, triton.cdiv(heads + 2 * kv_heads, HEADS_PER_PROGRAM))](
        qkv, cos, sin, query, keys, values, positions, heads, kv_heads, dim, cos.shape[1], HEADS_PER_PROGRAM,
        num_warps=4,
    )  # fmt: skip
    return query


@triton.jit
def _silu_product_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate = tl.load(gate_up_ptr + row * 2 * width + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + cols, mask=mask, other=0.0).to(tl.float32)
    # Rounded where torch's operators round.
    silu = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + row * width + cols, (up * silu).to(tl.bfloat16), mask=mask)


def silu_product(gate_up: Tensor) -> Tensor:
    """Returns ``up * silu(gate)``, bf16 [rows, width], of bf16 [rows, 2 * width]: gate, then up."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, device=gate_up.device, dtype=gate_up.dtype)
    _silu_product_kernel[(rows, triton.cdiv(width, COLUMNS_PER_PROGRAM))](
        gate_up, out, width, COLUMNS_PER_PROGRAM, num_warps=4
    )
    return out

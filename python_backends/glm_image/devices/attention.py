"""Attention of one new token per slot over a static KV cache, in two implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_decode_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Reads the whole cache under a mask, without host reads: capturable. Shapes as ``Device.decode_attention``.

    The heads that share a KV head become its queries, so the cache is read once and not expanded.
    """
    slots, heads, head_dim = query.shape
    grouped = query.view(slots, keys.shape[1], -1, head_dim)
    visible = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None]
    attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None])
    return attended.reshape(slots, heads, head_dim)


def ragged_decode_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Reads each slot's valid positions, slot by slot, with ``lengths`` on the host. Shapes as above.

    Each slot's call equals the reference implementation's for a batch of one, bit for bit. A slot with one position, as
    an idle one has, needs no call: it attends to that position alone.
    """
    attended = values[:, :, 0].repeat_interleave(query.shape[1] // values.shape[1], dim=1)
    for slot, length in enumerate(lengths.tolist()):
        if length > 1:
            attended[slot] = _attend(query[slot], keys[slot, :, :length], values[slot, :, :length])
    return attended


def masked_window_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    """``masked_decode_attention`` over a copy of each row's cache. Shapes as ``Device.window_attention``."""
    return masked_decode_attention(query, keys[slots], values[slots], lengths.clamp(min=1))


def ragged_window_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    """``ragged_decode_attention`` with several rows a slot, a call each. Shapes as ``Device.window_attention``."""
    attended = torch.zeros_like(query)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        if length > 0:
            attended[row] = _attend(query[row], keys[slot, :, :length], values[slot, :, :length])
    return attended


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attends from [heads, head_dim], as the result, to [kv_heads, positions, head_dim], as the reference does."""
    attended = F.scaled_dot_product_attention(query[None, :, None], keys[None], values[None], enable_gqa=True)
    return attended[0, :, 0]

"""Attention of one new token a slot over a static cache, in the two ways devices want it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_decode_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Reads the whole cache under a mask: no host reads, so it can be captured. Shapes as ``Device.decode_attention``.

    The heads that share a KV head are laid out as its queries, so the cache is read once and never repeated.
    """
    slots, heads, head_dim = query.shape
    grouped = query.view(slots, keys.shape[1], -1, head_dim)
    visible = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None]
    attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None])
    return attended.reshape(slots, heads, head_dim)


def ragged_decode_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Reads only what each slot has, slot by slot, with ``lengths`` on the host. Shapes as in the other way.

    Each slot's call is the one the reference makes for a batch of one, bit for bit.
    """
    rows = [
        F.scaled_dot_product_attention(
            query[slot, None, :, None], keys[slot, None, :, :length], values[slot, None, :, :length], enable_gqa=True
        )
        for slot, length in enumerate(lengths.tolist())
    ]
    return torch.cat(rows).squeeze(2)

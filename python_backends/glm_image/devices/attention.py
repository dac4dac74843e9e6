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

    Each slot's call equals the reference implementation's for a batch of one, bit for bit.
    """
    rows = [
        F.scaled_dot_product_attention(
            query[slot, None, :, None], keys[slot, None, :, :length], values[slot, None, :, :length], enable_gqa=True
        )
        for slot, length in enumerate(lengths.tolist())
    ]
    return torch.cat(rows).squeeze(2)

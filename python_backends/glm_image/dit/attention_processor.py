"""diffusers' attention module with its tokens or heads split among ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from glm_image.dit.sequence_parallel import Heads, SequenceAttention, SequenceShape


def plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attends from queries to keys, [batch, tokens, heads, head_dim] each, by torch's choice of a kernel."""
    query, keys, values = (tensor.transpose(1, 2) for tensor in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)


class SequenceParallelProcessor:
    """diffusers' ``GlmImageAttnProcessor`` with attention over the tokens of all ranks."""

    def __init__(self, attention: SequenceAttention) -> None:
        self._attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: Any = None,
        *,
        shape: SequenceShape,
    ) -> tuple[Tensor, Tensor]:
        """Attends from the own image and the text tokens, [1, tokens, width] each; ``kv_cache`` has the ``KvHook``."""
        if attention_mask is not None:
            raise ValueError("attention_mask is given; allowed: None")
        text = encoder_hidden_states.shape[1]
        hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            layer(hidden).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            _rotated(norm(part), text, image_rotary_emb) for norm, part in ((attn.norm_q, query), (attn.norm_k, key))
        )
        kv_hook: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = kv_cache.get if kv_cache else None
        attended = torch.empty_like(query)
        heads = Heads(torch.stack([query, key, value], dim=2)[0], text)
        self._attention([heads], [attended[0]], kv_hook, shape)
        out = attn.to_out[1](attn.to_out[0](attended.flatten(2)))
        text_out, image_out = out.split([text, out.shape[1] - text], dim=1)
        return image_out, text_out


def _rotated(heads: Tensor, text: int, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    image = apply_rotary_emb(heads[:, text:], rotary, sequence_dim=1, use_real_unbind_dim=-2)
    return torch.cat([heads[:, :text], image], dim=1)

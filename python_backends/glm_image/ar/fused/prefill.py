"""Prefill with few launches: nine per layer, where PyTorch has forty.

The launches of a short prompt take longer than its kernels, and delay the next token of the other slots. Matrix
products and attention are those of torch's libraries, chosen by the prompt's own length, so the result depends on
nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm_image.ar.fused.layers import layers_and_norms
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder, gathered_logits
from glm_image.kernels.prefill import rotate_and_store, silu_product
from glm_image.kernels.residual_norm import embed_norm, residual_norm


class FusedPrefill:
    """Prefill on the kernels, where ``fused.decoder.supports`` holds; the reference is ``Decoder.prefill``."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._layers, self._norms = layers_and_norms(decoder)

    @torch.inference_mode()
    def __call__(self, token_ids: Tensor, cos: Tensor, sin: Tensor, cache: KvCache, slot: int) -> Tensor:
        decoder, eps = self._decoder, self._decoder.config.norm_eps
        shape = (len(token_ids), decoder.config.hidden_size)
        residual, normed = torch.empty(2, *shape, device=token_ids.device, dtype=decoder.dtype)
        embed_norm(token_ids, decoder.embedding.weight, self._norms[0], residual, normed, eps)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(normed)
            attended = _attend(qkv, cos, sin, (cache.keys[index, slot], cache.values[index, slot]))
            branch = layer.group.all_reduce_sum(layer.out(attended))
            residual_norm(branch[None], residual, layer.after_attention.weight, layer.before_mlp.weight, normed, eps)
            branch = layer.group.all_reduce_sum(layer.down(silu_product(layer.gate_up(normed))))
            residual_norm(branch[None], residual, layer.after_mlp.weight, self._norms[index + 1], normed, eps)
        logits: Tensor = decoder.head(normed[-1:]).float()
        return gathered_logits(logits, decoder.group, decoder.config.vision_vocab_size)


def _attend(qkv: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
    query = rotate_and_store(qkv, cos, sin, cache)
    keys, values = (part[None, :, : len(query)] for part in cache)
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys, values, is_causal=True, enable_gqa=True
    )
    return attended[0].transpose(0, 1).flatten(1)

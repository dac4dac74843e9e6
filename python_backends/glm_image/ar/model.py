"""The decoder: a Transformer with grouped heads, partial M-RoPE and four norms a layer.

``prefill`` processes one prompt, ``decode`` adds one token to every slot. The arithmetic is that of transformers'
``modeling_glm_image.py``; q, k and v are one matrix here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm_image.ar.config import ArConfig
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.rotary import rotate
from glm_image.ar.weights import CheckpointNames
from glm_image.checkpoint.checkpoint import TensorSource, fill
from glm_image.devices.int8_linear import AnyLinear, Int8Product, quantize_linears
from glm_image.parallel.collectives import ALONE, Group

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Stores the keys and values of a layer and attends to them: from the layer's index, queries [rows, heads, tokens,
head_dim], keys and values [rows, kv_heads, tokens, head_dim] to [rows, heads, tokens, head_dim]."""

CacheAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attends to a layer's cache: from queries [rows, heads, head_dim], keys and values [slots, kv_heads, positions,
head_dim] to [rows, heads, head_dim]."""


class RmsNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.dtype != torch.float32:
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        # The arithmetic of the reference, to the last bit.
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps))


class DecoderLayer(nn.Module):
    """A rank's part of attention and MLP (Shoeybi et al., 2019), each between two norms."""

    def __init__(self, config: ArConfig, group: Group = ALONE) -> None:
        super().__init__()
        self.group = group
        hidden, width = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, width
        self.qkv: AnyLinear = nn.Linear(
            hidden, (config.heads + 2 * config.kv_heads) * width, bias=config.attention_bias
        )
        self.out: AnyLinear = nn.Linear(config.heads * width, hidden, bias=False)
        self.gate_up: AnyLinear = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down: AnyLinear = nn.Linear(config.intermediate_size, hidden, bias=False)
        self.before_attention = RmsNorm(hidden, config.norm_eps)
        self.after_attention = RmsNorm(hidden, config.norm_eps)
        self.before_mlp = RmsNorm(hidden, config.norm_eps)
        self.after_mlp = RmsNorm(hidden, config.norm_eps)

    def forward(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Runs the layer on ``hidden`` [rows, tokens, hidden]; cos and sin are [rows, 1, tokens, rotary_dim]."""
        qkv = self.qkv(self.before_attention(hidden)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = qkv.tensor_split([self.heads + self.kv_heads], dim=1)
        q, k = rotate(qk, cos, sin).tensor_split([self.heads], dim=1)  # one rotation: fewer launches
        attended = attend(index, q, k, v)
        hidden = hidden + self.after_attention(self.group.all_reduce_sum(self.out(attended.transpose(1, 2).flatten(2))))
        gate, up = self.gate_up(self.before_mlp(hidden)).chunk(2, dim=-1)
        output: Tensor = hidden + self.after_mlp(self.group.all_reduce_sum(self.down(up * F.silu(gate))))
        return output


class Decoder(nn.Module):
    """Embedding, layers and a head over the image vocabulary.

    The ranks of a group share it: each has some heads, channels and rows of the head.

    Attributes:
        config: of this rank's part; the constructor takes that of the whole decoder.
    """

    def __init__(self, config: ArConfig, group: Group = ALONE) -> None:
        super().__init__()
        self.config = config.part(group.size)
        self.group = group
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(self.config, group) for _ in range(config.layers))
        self.norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.head: AnyLinear = nn.Linear(
            config.hidden_size, len(group.shard_range(config.vision_vocab_size)), bias=False
        )

    @classmethod
    def load(
        cls, config: ArConfig, source: TensorSource, *, int8: Int8Product | None = None, group: Group = ALONE
    ) -> Decoder:
        """Builds the decoder, or a rank's part of it, on the source's device.

        Args:
            config: of the whole decoder.
            source: its tensors.
            int8: the device's product of int8 weights; None = the weights keep their dtype. Each layer is quantized
                before the next one is read.
            group: the ranks that share it.
        """
        with torch.device("meta"):
            decoder = cls(config, group)
        names = CheckpointNames(source, config, group)
        parts = {name: part for name, part in decoder.named_children() if name != "layers"}
        parts.update((f"layers.{index}", layer) for index, layer in enumerate(decoder.layers))
        for name, part in parts.items():
            fill(part, names, f"{name}.")
            if int8 is not None:
                quantize_linears(part, int8)
        if int8 is not None:
            quantize_linears(decoder, int8)  # the head
        return decoder

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor, cos: Tensor, sin: Tensor, cache: KvCache, slot: int) -> Tensor:
        """Processes a prompt; returns the fp32 logits of the token after it, [1, vision_vocab_size].

        Args:
            token_ids: int64 [tokens].
            cos: [tokens, rotary_dim].
            sin: as ``cos``.
            cache: written from position 0.
            slot: where in the cache.
        """

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write_prompt(layer, slot, key[0], value[0])
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        hidden = self._layers(self.embedding(token_ids)[None], cos[None, None], sin[None, None], attend)
        return self._logits(hidden[:, -1])

    def decode(
        self,
        token_ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KvCache,
        attention: CacheAttention,
    ) -> Tensor:
        """Adds tokens to slots; returns fp32 logits [rows, vision_vocab_size]. Never waits for the device.

        Args:
            token_ids: int64 [rows].
            slots: int64 [rows]: the slot of each token.
            positions: int64 [rows]: the position of each token in its slot.
            cos: [rows, rotary_dim], at this token's position.
            sin: as ``cos``.
            cache: read and written.
            attention: called when the keys and values of all tokens are in the cache.
        """

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.append(layer, slots, positions, key.squeeze(2), value.squeeze(2))
            return attention(query.squeeze(2), keys, values).unsqueeze(2)

        hidden = self._layers(self.embedding(token_ids)[:, None], cos[:, None, None], sin[:, None, None], attend)
        return self._logits(hidden[:, 0])

    def _layers(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        for index, layer in enumerate(self.layers):
            hidden = layer(index, hidden, cos, sin, attend)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(hidden)).float()
        return gathered_logits(logits, self.group, self.config.vision_vocab_size)


def gathered_logits(logits: Tensor, group: Group, vocabulary: int) -> Tensor:
    """Returns the logits of the whole vocabulary, [rows, vocabulary], from those of each rank's part."""
    if group.size == 1:
        return logits
    return group.all_gather_rows(logits.transpose(0, 1), vocabulary).transpose(0, 1).contiguous()

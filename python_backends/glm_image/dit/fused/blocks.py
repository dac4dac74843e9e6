"""The transformer's blocks with few passes over memory: both branches of guidance as rows of one matrix.

Text and image tokens share all weights but the modulation's, and rows are independent of each other in everything but
attention. So the sequences of a step lie one after the other in one matrix, whatever the length of their text; linears
and norms run over the matrix and only attention runs sequence by sequence. The reference implementation is diffusers'
own blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from glm_image.devices.quantization import QuantizedRows
from glm_image.dit.blocks import Blocks, Tokens, check_sequences
from glm_image.dit.conditioning import Rotary
from glm_image.dit.fused.linears import AnyLinear, concatenate, linears_for
from glm_image.dit.sequence_parallel import Heads, SequenceAttention, SequenceShape
from glm_image.dit.source_kv import KvHook
from glm_image.kernels.head_norm_rotary import head_norm_rotary, scatter_heads
from glm_image.kernels.modulated_norm import (
    GATE_ATTENTION,
    GATE_MLP,
    SCALE_ATTENTION,
    SCALE_MLP,
    SHIFT_ATTENTION,
    SHIFT_MLP,
    GatedBranch,
    modulated_norm,
)

# cuDNN's is the fastest at these lengths. diffusers' dispatch would copy queries, keys and values before calling it.
ATTENTION = {
    SDPBackend.CUDNN_ATTENTION: "_native_cudnn",
    SDPBackend.FLASH_ATTENTION: "_native_flash",
    SDPBackend.EFFICIENT_ATTENTION: "_native_efficient",
}
"""Kernels in the order of preference, with their names in diffusers' dispatch."""

PROBE_TOKENS = 1024


def supports(transformer: Any) -> bool:
    """Returns whether the kernels can run a transformer: bf16 weights, heads a power of two wide."""
    dim = transformer.config.attention_head_dim
    return bool(transformer.proj_out.weight.dtype == torch.bfloat16 and dim & (dim - 1) == 0)


class FusedBlock:
    """The weights of one of diffusers' ``GlmImageTransformerBlock``; q, k and v become one matrix."""

    def __init__(self, block: Any) -> None:
        attention = block.attn1
        self.qkv: AnyLinear = concatenate([attention.to_q, attention.to_k, attention.to_v])
        self.out: AnyLinear = attention.to_out[0]
        self.modulation: nn.Linear = block.norm1.linear
        self.up: AnyLinear = block.ff.net[0].proj
        self.down: AnyLinear = block.ff.net[2]


class FusedBlocks(Blocks):
    """Runs all blocks of diffusers' ``GlmImageTransformer2DModel``, whose own forward can't be used afterwards.

    Args:
        transformer: bf16, the linear layers of its blocks bf16 or ``QuantizedLinear``, on a device that runs Triton.
        attention: attends where several ranks share the tokens; None where they do not.
    """

    def __init__(self, transformer: Any, attention: SequenceAttention | None = None) -> None:
        config, first = transformer.config, transformer.transformer_blocks[0]
        self._heads, self._head_dim = first.attn1.heads, config.attention_head_dim
        self._attention = attention
        self._norm_eps, self._head_eps = first.norm2.eps, first.attn1.norm_q.eps
        self._blocks = [FusedBlock(block) for block in transformer.transformer_blocks]
        self._linears = linears_for(self._blocks[0].qkv)
        self.attention_backend = attention.backend if attention else attention_backend(transformer)

    def __len__(self) -> int:
        return len(self._blocks)

    def run(
        self,
        which: range,
        sequences: list[Tokens],
        time: Tensor,
        rotary: Rotary,
        kv_hooks: Sequence[KvHook] | None = None,
        shape: SequenceShape | None = None,
        /,
    ) -> list[Tokens]:
        """Runs some of the blocks over one or two sequences at the same time step; see ``Blocks.run``."""
        check_sequences(sequences)
        linears, eps = self._linears, self._norm_eps
        residual = torch.cat([part for image, text in sequences for part in (text[0], image[0])])
        lengths = [(text.shape[1], image.shape[1]) for image, text in sequences]
        rows = [sum(length) for length in lengths]
        segments = (lengths[0][0], rows[0], lengths[-1][0])
        blocks = [self._blocks[index] for index in which]
        tables = [F.linear(time, block.modulation.weight, block.modulation.bias)[0] for block in blocks]
        normed = linears.empty_input(residual)
        modulated_norm(residual, tables[0], normed, eps, segments, SHIFT_ATTENTION, SCALE_ATTENTION)
        for index, block, table, following in zip(which, blocks, tables, [*tables[1:], None], strict=True):
            kv_hook = kv_hooks[index] if kv_hooks else None
            attended = self._attend(block, normed, rotary, segments, rows, kv_hook, shape)
            branch = GatedBranch(linears.linear(block.out, linears.to_input(attended)), table, GATE_ATTENTION)
            modulated_norm(residual, table, normed, eps, segments, SHIFT_MLP, SCALE_MLP, branch)
            branch = GatedBranch(linears.linear(block.down, linears.linear_gelu(block.up, normed)), table, GATE_MLP)
            modulated_norm(residual, following, normed, eps, segments, SHIFT_ATTENTION, SCALE_ATTENTION, branch)
        parts = residual.split([count for length in lengths for count in length])
        return [(image[None], text[None]) for text, image in zip(parts[::2], parts[1::2], strict=True)]

    def _attend(
        self,
        block: FusedBlock,
        normed: Tensor | QuantizedRows,
        rotary: Rotary,
        segments: tuple[int, int, int],
        rows: list[int],
        kv_hook: KvHook | None,
        shape: SequenceShape | None,
    ) -> Tensor:
        qkv = self._linears.linear(block.qkv, normed).view(-1, 3, self._heads, self._head_dim)
        sequences = qkv.split(rows)
        if self._attention is not None and shape is not None:
            texts = (segments[0], segments[2])[: len(rows)]
            unnormed = [
                _UnnormedHeads(sequence, text, rotary, self._head_eps)
                for sequence, text in zip(sequences, texts, strict=True)
            ]
            heads = qkv.new_empty(len(qkv), self._heads, self._head_dim)
            self._attention(unnormed, heads.split(rows), kv_hook, shape)
            return heads.flatten(1)
        head_norm_rotary(qkv, rotary, self._head_eps, segments)
        attended: list[Tensor] = []
        for sequence in sequences:
            query, key, value = sequence[None].unbind(2)
            if kv_hook is not None and not attended:
                key, value = kv_hook(key, value)
            attended.append(attention(query, key, value)[0].flatten(1))
        return torch.cat(attended) if len(attended) > 1 else attended[0]


class _UnnormedHeads(Heads):
    """Heads that are normed and rotated when they are read."""

    def __init__(self, qkv: Tensor, text: int, rotary: Rotary, eps: float) -> None:
        super().__init__(qkv, text)
        self._rotary, self._eps = rotary, eps

    def normed(self) -> Tensor:
        head_norm_rotary(self.qkv, self._rotary, self._eps, (self.text, len(self.qkv), 0))
        return self.qkv

    def scatter_heads(self, rank: int, text: Tensor, image: Tensor) -> None:
        scatter_heads(self.qkv, self.text, self._rotary, self._eps, rank, text, image)


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attends from queries to keys, [batch, tokens, heads, head_dim] each, by the preferred kernel that can."""
    query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))
    with sdpa_kernel(list(ATTENTION), set_priority=True):
        return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)


def attention_backend(transformer: Any) -> str:
    """Returns diffusers' name of the kernel that ``attention`` selects for a transformer, without running it."""
    config, weight = transformer.config, transformer.proj_out.weight
    shape = (1, PROBE_TOKENS, config.num_attention_heads, config.attention_head_dim)
    probe = torch.empty(shape, dtype=weight.dtype, device=weight.device).transpose(1, 2)
    with sdpa_kernel(list(ATTENTION), set_priority=True):
        return ATTENTION.get(SDPBackend(torch._fused_sdp_choice(probe, probe, probe)), "native")

"""The transformer's blocks with few passes over memory: both branches of guidance as rows of one matrix.

Text and image tokens share all weights but the modulation's, and rows are independent of each other in everything but
attention. So the sequences of a step lie one after the other in one matrix, whatever the length of their text; linears
and norms run over all of it and only attention is done sequence by sequence. The twin is diffusers' own blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from glm_image.dit.sequence import SequenceAttention
from glm_image.dit.sources import Join
from glm_image.kernels.head_norm_rotary import head_norm_rotary
from glm_image.kernels.modulated_norm import (
    GATE_ATTENTION,
    GATE_MLP,
    SCALE_ATTENTION,
    SCALE_MLP,
    SHIFT_ATTENTION,
    SHIFT_MLP,
    gated_modulated_norm,
    modulated_norm,
)

MOST_SEQUENCES = 2

# cuDNN's is the fastest at these lengths. diffusers' dispatch would copy queries, keys and values before calling it.
ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def supports(transformer: Any) -> bool:
    """Tells whether the kernels can run a transformer: bf16 weights, heads a power of two wide."""
    dim = transformer.config.attention_head_dim
    return bool(transformer.proj_out.weight.dtype == torch.bfloat16 and dim & (dim - 1) == 0)


class FusedBlock:
    """The weights of one of diffusers' ``GlmImageTransformerBlock``; q, k and v become one matrix."""

    def __init__(self, block: Any) -> None:
        attention = block.attn1
        projections = (attention.to_q, attention.to_k, attention.to_v)
        self.qkv_weight = torch.cat([projection.weight for projection in projections])
        self.qkv_bias = torch.cat([projection.bias for projection in projections])
        for projection in projections:  # their memory is the fused matrix's now
            projection.weight = projection.bias = None
        self.out: nn.Linear = attention.to_out[0]
        self.modulation: nn.Linear = block.norm1.linear
        self.up: nn.Linear = block.ff.net[0].proj
        self.down: nn.Linear = block.ff.net[2]


class FusedBlocks:
    """Runs all blocks of diffusers' ``GlmImageTransformer2DModel``, whose own forward can't be used afterwards.

    Args:
        transformer: bf16, on a device that runs Triton.
        shared: attends where several ranks share the tokens.
    """

    def __init__(self, transformer: Any, shared: SequenceAttention | None = None) -> None:
        config, first = transformer.config, transformer.transformer_blocks[0]
        self._heads, self._head_dim = first.attn1.heads, config.attention_head_dim
        self._shared = shared
        self._norm_eps, self._head_eps = first.norm2.eps, first.attn1.norm_q.eps
        self._blocks = [FusedBlock(block) for block in transformer.transformer_blocks]

    def __call__(
        self,
        sequences: list[tuple[Tensor, Tensor]],
        time: Tensor,
        rotary: tuple[Tensor, Tensor],
        joins: Sequence[Join] | None = None,
        /,
    ) -> list[Tensor]:
        """Runs the blocks over one or two sequences at the same time step.

        Args:
            sequences: image tokens [1, image tokens, width] and text tokens [1, text tokens, width] of each.
            time: silu(time embedding), [1, time width].
            rotary: cosines and sines, fp32 [image tokens, head_dim] each.
            joins: for each block, what happens to the first sequence's keys and values before its attention.

        Returns:
            The image tokens of each sequence.
        """
        if not 1 <= len(sequences) <= MOST_SEQUENCES:
            raise ValueError(f"{len(sequences)} sequences; allowed: 1 or {MOST_SEQUENCES}")
        residual = torch.cat([part for image, text in sequences for part in (text[0], image[0])])
        lengths = [(text.shape[1], image.shape[1]) for image, text in sequences]
        segments = (lengths[0][0], sum(lengths[0]), lengths[-1][0])
        tables = [F.linear(time, block.modulation.weight, block.modulation.bias)[0] for block in self._blocks]
        normed = torch.empty_like(residual)
        modulated_norm(residual, tables[0], normed, self._norm_eps, segments, SHIFT_ATTENTION, SCALE_ATTENTION)
        for index, block in enumerate(self._blocks):
            join = joins[index] if joins else None
            branch = block.out(self._attend(block, normed, rotary, segments, [sum(length) for length in lengths], join))
            table = tables[index]
            gated_modulated_norm(
                residual, branch, table, GATE_ATTENTION, table, normed, self._norm_eps, segments, SHIFT_MLP, SCALE_MLP
            )
            # The GELU of the GEMM's epilogue is the approximation by tanh, as the model's.
            product = torch._addmm_activation(block.up.bias, normed, block.up.weight.T, use_gelu=True)
            branch = block.down(product)
            following = tables[index + 1] if index + 1 < len(tables) else None
            gated_modulated_norm(
                residual,
                branch,
                table,
                GATE_MLP,
                following,
                normed,
                self._norm_eps,
                segments,
                SHIFT_ATTENTION,
                SCALE_ATTENTION,
            )
        parts = residual.split([rows for length in lengths for rows in length])
        return [image[None] for image in parts[1::2]]

    def _attend(
        self,
        block: FusedBlock,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
        segments: tuple[int, int, int],
        lengths: list[int],
        join: Join | None,
    ) -> Tensor:
        qkv = F.linear(normed, block.qkv_weight, block.qkv_bias)
        head_norm_rotary(qkv, self._heads, self._head_dim, rotary, self._head_eps, segments)
        attended: list[Tensor] = []
        for sequence, text in zip(qkv.split(lengths), (segments[0], segments[2]), strict=False):
            query, key, value = sequence.view(1, -1, 3, self._heads, self._head_dim).unbind(2)
            own = None if attended else join
            if self._shared is not None:
                attended.append(self._shared(query, key, value, text, own)[0].flatten(1))
                continue
            if own is not None:
                key, value = own(key, value)
            attended.append(attention(query, key, value)[0].flatten(1))
        return torch.cat(attended) if len(attended) > 1 else attended[0]


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attends from queries to keys, [batch, tokens, heads, head_dim] each, with the fastest kernel there is."""
    query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))
    with sdpa_kernel(list(ATTENTION), set_priority=True):
        return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)

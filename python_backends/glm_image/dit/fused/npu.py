"""The transformer's blocks and the VAE's norms on the operators of torch_npu: 26 launches a block, 30 with int8.

Both branches of guidance are rows of one matrix, as in ``dit.fused.blocks``, but in another order: the first sequence
ends with its text and the second begins with its own. Each sequence and all of the text are then contiguous, so that
attention over both sequences is one operator, and no operand is copied to be laid out anew. The modulation of a norm is
the norm's own weight and bias. The reference implementation is diffusers' own blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm_image.devices.base import Device
from glm_image.dit.blocks import Blocks, Tokens, check_sequences
from glm_image.dit.conditioning import Rotary
from glm_image.dit.quantization import QuantizedLinear
from glm_image.dit.sequence_parallel import SequenceShape
from glm_image.dit.source_kv import KvHook

SHIFT, SCALE, GATE = range(3)
ATTENTION, MLP = range(2)


class NpuBlocks(Blocks):
    """Runs all blocks of diffusers' ``GlmImageTransformer2DModel`` on an NPU; ranks may not share tokens."""

    attention_backend = "_native_npu"  # diffusers' name of the operator

    def __init__(self, transformer: Any, device: Device) -> None:
        first = transformer.transformer_blocks[0]
        self._blocks, self._device = list(transformer.transformer_blocks), device
        self._heads, self._head_dim = first.attn1.heads, transformer.config.attention_head_dim
        self._norm_eps, self._head_eps = first.norm2.eps, first.attn1.norm_q.eps

    def __len__(self) -> int:
        return len(self._blocks)

    def run(
        self,
        which: range,
        sequences: list[Tokens],
        time: Tensor,
        rotary: Rotary,
        kv_hooks: Sequence[KvHook] | None = None,
        _: SequenceShape | None = None,
        /,
    ) -> list[Tokens]:
        """Runs some of the blocks over one or two sequences at the same time step; see ``Blocks.run``."""
        check_sequences(sequences)
        (image, text), *others = sequences
        parts = [image[0], text[0], *(part[0] for other in others for part in reversed(other))]
        residual = torch.cat(parts)
        rows = _Rows([len(part) for part in parts])
        tables = self._rotary_tables(rotary, rows, residual.dtype)
        for index in which:
            block = self._blocks[index]
            modulation = _Modulation(block.norm1.linear, time, residual.shape[1])
            hook = kv_hooks[index] if kv_hooks else None
            normed = modulation.normed(ATTENTION, residual, rows, self._norm_eps)
            attended = self._attend(block.attn1, normed, tables, rows, hook)
            modulation.add(ATTENTION, block.attn1.to_out[0](attended), residual, rows)
            normed = modulation.normed(MLP, residual, rows, self._norm_eps)
            hidden = self._device.tanh_gelu(block.ff.net[0].proj(normed))
            modulation.add(MLP, block.ff.net[2](hidden), residual, rows)
        image, text, *others = (part[None] for part in residual.split(rows.lengths))
        return [(image, text), *([(others[1], others[0])] if others else [])]

    def _rotary_tables(self, rotary: Rotary, rows: _Rows, dtype: torch.dtype) -> Rotary:
        """Returns tables [1, rows, 1, head_dim] of all rows; text is turned by the angle 0."""
        images = len(rows.lengths) // 2
        tables = []
        for table, still in zip(rotary, (1.0, 0.0), strict=True):
            own = table.to(dtype)
            text = own.new_full((rows.text.stop - rows.text.start, self._head_dim), still)
            tables.append(torch.cat([own, text, own][: images + 1]).view(1, -1, 1, self._head_dim))
        return tables[0], tables[1]

    def _attend(self, attention: Any, normed: Tensor, tables: Rotary, rows: _Rows, hook: KvHook | None) -> Tensor:
        query, key, value = (
            part.view(-1, self._heads, self._head_dim)
            for part in _outputs([attention.to_q, attention.to_k, attention.to_v], normed)
        )
        query, key = (
            torch.ops.npu.npu_rotary_mul(F.layer_norm(part, part.shape[-1:], eps=self._head_eps)[None], *tables)[0]
            for part in (query, key)
        )
        if hook is None:
            return _attention(query, key, value, rows.sequences).flatten(1)
        first, *others = zip(*(part.split(rows.sequences) for part in (query, key, value)), strict=True)
        keys, values = hook(first[1][None], first[2][None])
        attended = [_attention(first[0], keys[0], values[0]), *(_attention(*other) for other in others)]
        return (torch.cat(attended) if others else attended[0]).flatten(1)


class _Rows:
    """The rows of the matrix: image and text of the first sequence, then text and image of the second, if any.

    Attributes:
        lengths: of these parts.
        sequences: rows of each sequence.
        text: the rows of all text, which lie together.
        images: the rows of each image.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.sequences = [sum(lengths[:2]), *([sum(lengths[2:])] if lengths[2:] else [])]
        self.text = slice(lengths[0], sum(lengths[:3]))
        self.images = [slice(lengths[0]), *([slice(self.text.stop, None)] if lengths[2:] else [])]


class _Modulation:
    """A block's shifts, scales and gates of image and text rows at a time step."""

    def __init__(self, linear: nn.Linear, time: Tensor, width: int) -> None:
        # Shift, scale and gate of the attention, then of the MLP; each for image rows and for text rows.
        self._table = F.linear(time, linear.weight, linear.bias).view(2, 3, 2, width)
        self._table[:, SCALE].add_(1)

    def normed(self, part: int, residual: Tensor, rows: _Rows, eps: float) -> Tensor:
        """Normalises and modulates. All rows as if they were images, then text again: it is short."""
        shift, scale, _ = self._table[part]
        normed = F.layer_norm(residual, residual.shape[1:], scale[0], shift[0], eps)
        if rows.text.start < rows.text.stop:
            normed[rows.text] = F.layer_norm(residual[rows.text], residual.shape[1:], scale[1], shift[1], eps)
        return normed

    def add(self, part: int, branch: Tensor, residual: Tensor, rows: _Rows) -> None:
        """Adds a branch's gated output to the residual, in place."""
        image, text = self._table[part, GATE]
        for which, gate in (*((own, image) for own in rows.images), (rows.text, text)):
            if len(residual[which]):
                residual[which].addcmul_(branch[which], gate)


def _outputs(layers: list[Any], hidden: Tensor) -> list[Tensor]:
    """Returns the outputs of linear layers with one input, which is quantized once."""
    if not isinstance(layers[0], QuantizedLinear):
        return [layer(hidden) for layer in layers]
    rows = layers[0].quantized(hidden)
    return [layer.product(rows, hidden.dtype) for layer in layers]


def _attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Attends within each sequence, from [tokens, heads, head_dim] to the same.

    ``lengths`` are those of several sequences, with as many keys as queries; None is one sequence.
    """
    ends = [list(accumulate(lengths))] * 2 if lengths else [[len(query)], [len(keys)]]
    heads, head_dim = query.shape[1:]
    attended: Tensor = torch.ops.npu.npu_fusion_attention(
        query,
        keys,
        values,
        heads,
        "TND",  # sequences of any lengths, one after the other
        scale=head_dim**-0.5,
        actual_seq_qlen=ends[0],
        actual_seq_kvlen=ends[1],
    )[0]
    return attended


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attends from queries to keys, [1, tokens, heads, head_dim] each; as ``dit.sequence_parallel.Attend``."""
    return _attention(query[0], keys[0], values[0])[None]


class GroupNormSilu(nn.Module):
    """A group norm followed by its SiLU."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, image: Tensor) -> Tensor:
        """Normalises and activates [1, channels, height, width]."""
        norm = self._norm
        result: Tensor = torch.ops.npu.npu_group_norm_silu(image, norm.weight, norm.bias, norm.num_groups, norm.eps)[0]
        return result

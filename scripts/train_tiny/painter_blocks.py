"""The DiT's blocks and the glyph encoder as training runs them: what their modules compute, in one compiled call each.

At this width a module's forward and backward are thousands of small operations, and launching them takes several times
as long as the GPU needs for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
UNSEEN = -1e4
"""Added to a score, leaves nothing of its weight."""

Source = tuple[Tensor, Tensor]
"""Keys and values of a source picture in one block, [n, heads, tokens, head_dim] each."""


def block_forward(
    block: Any,
    hidden: Tensor,
    words: Tensor,
    time: Tensor,
    rotary: tuple[Tensor, Tensor],
    source: Source | None = None,
) -> tuple[Tensor, Source]:
    """Runs a block of the DiT.

    Words and image are one sequence, so that any number of words, none too, is the same compiled code.

    Args:
        block: diffusers' ``GlmImageTransformerBlock``.
        hidden: [n, tokens, width].
        words: bool [tokens]: which of them are of glyphs, not of the image.
        time: [n, time width].
        rotary: cosines and sines, [tokens, head_dim].
        source: keys and values to attend to besides.

    Returns:
        hidden as given, and the block's own keys and values.
    """
    table = block.norm1.linear(time).unflatten(1, (6, 2, -1)).unbind(1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
        torch.where(words[:, None], of_text, of_image)
        for of_image, of_text in (pair[:, :, None].unbind(1) for pair in table)
    )
    attended, made = _attention(block.attn1, _modulated(hidden, shift, scale), rotary, source)
    hidden = hidden + attended * gate
    after: Tensor = hidden + block.ff(_modulated(hidden, shift_mlp, scale_mlp)) * gate_mlp
    return after, made


def _modulated(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=EPS)
    return (normed * (1 + scale.float()) + shift.float()).to(hidden.dtype)


def _attention(
    attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], source: Source | None
) -> tuple[Tensor, Source]:
    linears = (attention.to_q, attention.to_k, attention.to_v)
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    query, key, value = F.linear(hidden, weight, bias).unflatten(2, (3, attention.heads, -1)).unbind(2)
    query, key = (_turned(heads, *rotary).transpose(1, 2) for heads in (query, key))
    made = key, value.transpose(1, 2)
    keys, values = made if source is None else (torch.cat(pair, dim=2) for pair in zip(source, made, strict=True))
    attended = F.scaled_dot_product_attention(query, keys, values)
    return attention.to_out[0](attended.transpose(1, 2).flatten(2)), made


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normed = F.layer_norm(heads.float(), heads.shape[-1:], eps=EPS)
    first, second = normed.chunk(2, dim=-1)
    halves = torch.cat([-second, first], dim=-1)
    return (normed * cos[:, None] + halves * sin[:, None]).to(heads.dtype)


def glyph_states(encoder: Any, ids: Tensor, bias: Tensor) -> Tensor:
    """The hidden states [n, tokens, width] that a ``T5EncoderModel`` has for ids [n, tokens], all of them words.

    Args:
        encoder: transformers' module (Raffel et al., 2020, with gated GELU).
        ids: byte tokens.
        bias: ``glyph_bias`` of as many tokens: several strings may follow one another, each by itself.
    """
    hidden = encoder.shared(ids)
    for block in encoder.encoder.block:
        attend, feed = block.layer
        own = attend.SelfAttention
        normed = _rms(hidden, attend.layer_norm)
        query, key, value = (
            linear(normed).unflatten(2, (own.n_heads, -1)).transpose(1, 2) for linear in (own.q, own.k, own.v)
        )
        # Without the usual scale.
        attended = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), scale=1.0)
        hidden = hidden + own.o(attended.transpose(1, 2).flatten(2))
        dense = feed.DenseReluDense
        normed = _rms(hidden, feed.layer_norm)
        hidden = hidden + dense.wo(F.gelu(dense.wi_0(normed), approximate="tanh") * dense.wi_1(normed))
    return _rms(hidden, encoder.encoder.final_layer_norm)


def glyph_bias(encoder: Any, apart: Tensor) -> Tensor:
    """What the places of words add to the scores of their attention, [1, heads, tokens, tokens].

    Args:
        encoder: as of ``glyph_states``.
        apart: bool [tokens, tokens]: which do not see each other, as ``strings_apart`` gives it.
    """
    bias: Tensor = encoder.encoder.block[0].layer[0].SelfAttention.compute_bias(*apart.shape)
    return bias.masked_fill(apart, UNSEEN)


def strings_apart(lengths: Sequence[int]) -> Tensor:
    """Which bytes of strings of so many, one after another, are of different strings: bool [tokens, tokens]."""
    string = torch.repeat_interleave(torch.tensor(lengths))
    return string[:, None] != string


def _rms(hidden: Tensor, norm: Any) -> Tensor:
    normed = hidden.float() * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return (norm.weight * normed).to(hidden.dtype)

"""The DiT's blocks and the glyph encoder as training runs them: what their modules compute, in one compiled call each.

At this width a module's forward and backward are thousands of small operations, and launching them takes several times
as long as the GPU needs for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5

Source = tuple[Tensor, Tensor]
"""Keys and values of a source picture in one block, [n, heads, tokens, head_dim] each."""


def block_forward(
    block: Any,
    image: Tensor,
    text: Tensor | None,
    time: Tensor,
    rotary: tuple[Tensor, Tensor],
    source: Source | None = None,
) -> tuple[Tensor, Tensor | None, Source]:
    """Runs a block of the DiT.

    Args:
        block: diffusers' ``GlmImageTransformerBlock``.
        image: [n, tokens, width].
        text: [n, glyph tokens, width]; None where there are none.
        time: [n, time width].
        rotary: cosines and sines of the image's tokens, [tokens, head_dim].
        source: keys and values to attend to besides.

    Returns:
        image and text as given, and the block's own keys and values.
    """
    table = block.norm1.linear(time)[:, None].chunk(12, dim=2)
    of_image, of_text = table[::2], table[1::2]
    words = 0 if text is None else text.shape[1]
    joined = _modulated(image, of_image[0], of_image[1])
    if text is not None:
        joined = torch.cat([_modulated(text, of_text[0], of_text[1]), joined], dim=1)
    attended, made = _attention(block.attn1, joined, words, rotary, source)
    image = _end(block, image, attended[:, words:], of_image)
    if text is not None:
        text = _end(block, text, attended[:, :words], of_text)
    return image, text, made


def _modulated(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=EPS)
    return (normed * (1 + scale.float()) + shift.float()).to(hidden.dtype)


def _end(block: Any, hidden: Tensor, attended: Tensor, table: tuple[Tensor, ...]) -> Tensor:
    _, _, gate, shift, scale, gate_mlp = table
    hidden = hidden + attended * gate
    after: Tensor = hidden + block.ff(_modulated(hidden, shift, scale)) * gate_mlp
    return after


def _attention(
    attention: Any, joined: Tensor, words: int, rotary: tuple[Tensor, Tensor], source: Source | None
) -> tuple[Tensor, Source]:
    linears = (attention.to_q, attention.to_k, attention.to_v)
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    query, key, value = F.linear(joined, weight, bias).unflatten(2, (3, attention.heads, -1)).unbind(2)
    # Words are not rotated.
    cos, sin = (F.pad(table, (0, 0, words, 0), value=still) for table, still in zip(rotary, (1.0, 0.0), strict=True))
    query, key = (_turned(heads, cos, sin).transpose(1, 2) for heads in (query, key))
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
        bias: ``glyph_bias`` of as many tokens.
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


def glyph_bias(encoder: Any, tokens: int) -> Tensor:
    """What the places of ``tokens`` words add to the scores of their attention, [1, heads, tokens, tokens]."""
    bias: Tensor = encoder.encoder.block[0].layer[0].SelfAttention.compute_bias(tokens, tokens)
    return bias


def _rms(hidden: Tensor, norm: Any) -> Tensor:
    normed = hidden.float() * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return (norm.weight * normed).to(hidden.dtype)

"""The DiT's blocks for training: what ``GlmImageTransformerBlock`` computes, with a quarter of the passes over memory.

diffusers' block of this width spends its time on norms, rotations and gates, each in a launch and in fp32. They are
three functions here, which a GPU compiles in seconds and for all sizes. A whole block takes a minute to compile for
each kind of call, and the compiler fails at some of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train_tiny.compilation import Forward, compiled

EPS = 1e-5

Source = tuple[Tensor, Tensor]
"""Keys and values of a source picture in one block, [n, heads, tokens, head_dim] each."""


def modulated(hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The norm of ``hidden`` [n, tokens, width], scaled and shifted by [n, width]."""
    normed = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=EPS)
    return (normed * (1 + scale[:, None].float()) + shift[:, None].float()).to(hidden.dtype)


def gated(hidden: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``hidden`` and a branch weighed by [n, width]."""
    return hidden + branch * gate[:, None]


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The norm of ``heads`` [n, tokens, heads, head_dim], rotated by tables [tokens, head_dim]."""
    normed = F.layer_norm(heads.float(), heads.shape[-1:], eps=EPS)
    first, second = normed.chunk(2, dim=-1)
    halves = torch.cat([-second, first], dim=-1)
    return (normed * cos[:, None] + halves * sin[:, None]).to(heads.dtype)


class Passes(NamedTuple):
    """The three passes, as they are or compiled."""

    modulated: Forward = modulated
    gated: Forward = gated
    turned: Forward = turned


PLAIN = Passes()


def fast_passes(device: torch.device) -> Passes:
    """The passes, compiled where the device is a GPU."""
    return Passes(*(compiled(each, device) for each in PLAIN))


def block_forward(
    block: Any,
    image: Tensor,
    text: Tensor,
    time: Tensor,
    rotary: tuple[Tensor, Tensor],
    source: Source | None = None,
    passes: Passes = PLAIN,
) -> tuple[Tensor, Tensor, Source]:
    """Runs a block.

    Args:
        block: diffusers' ``GlmImageTransformerBlock``.
        image: [n, tokens, width].
        text: [n, glyph tokens, width]; may have none.
        time: [n, time width].
        rotary: cosines and sines of the image's tokens, [tokens, head_dim].
        source: keys and values to attend to besides.
        passes: over the image; the few words take the plain ones.

    Returns:
        image and text as given, and the block's own keys and values.
    """
    table = block.norm1.linear(time).chunk(12, dim=1)
    (shift, scale, gate, shift_mlp, scale_mlp, gate_mlp), own = table[::2], table[1::2]
    seen = passes.modulated(image, scale, shift)
    read = modulated(text, own[1], own[0])
    attended, made = _attention(block.attn1, torch.cat([read, seen], dim=1), text.shape[1], rotary, source, passes)
    from_text, from_image = attended.split([text.shape[1], image.shape[1]], dim=1)
    image = passes.gated(image, from_image, gate)
    image = passes.gated(image, block.ff(passes.modulated(image, scale_mlp, shift_mlp)), gate_mlp)
    text = gated(text, from_text, own[2])
    text = gated(text, block.ff(modulated(text, own[4], own[3])), own[5])
    return image, text, made


def _attention(
    attention: Any,
    joined: Tensor,
    words: int,
    rotary: tuple[Tensor, Tensor],
    source: Source | None,
    passes: Passes,
) -> tuple[Tensor, Source]:
    linears = (attention.to_q, attention.to_k, attention.to_v)
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    query, key, value = F.linear(joined, weight, bias).unflatten(2, (3, attention.heads, -1)).unbind(2)
    # Words are not rotated.
    cos, sin = (F.pad(table, (0, 0, words, 0), value=still) for table, still in zip(rotary, (1.0, 0.0), strict=True))
    query, key = (passes.turned(heads, cos, sin).transpose(1, 2) for heads in (query, key))
    made = key, value.transpose(1, 2)
    keys, values = made if source is None else (torch.cat(pair, dim=2) for pair in zip(source, made, strict=True))
    attended = F.scaled_dot_product_attention(query, keys, values)
    return attention.to_out[0](attended.transpose(1, 2).flatten(2)), made

"""A small transformer, arguments of its blocks, and the error of a result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import GlmImageTransformer2DModel
from torch import Tensor

from glm_image.checkpoint.checkpoint import RandomTensors
from glm_image.dit.blocks import Rotary, Tokens

GRID = (2, 4)
HEADS, HEAD_DIM, TIME_DIM = 3, 32, 32
LARGER = 5
"""Factor on the random weights' deviation: about the inverse square root of the blocks' width."""


class LargeTensors(RandomTensors):
    """Random weights with which blocks change their tokens by about their own size, instead of by a rounding."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return super().read(name, shape) * (LARGER if len(shape) == 2 else 1)


def empty_transformer() -> GlmImageTransformer2DModel:
    """Two blocks on the meta device."""
    with torch.device("meta"):
        return GlmImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            text_embed_dim=24,
            time_embed_dim=TIME_DIM,
            condition_dim=16,
            prior_vq_quantizer_codebook_size=64,
        )


def arguments(
    transformer: GlmImageTransformer2DModel, device: torch.device, text_tokens: tuple[int, ...]
) -> tuple[list[Tokens], Tensor, Rotary]:
    """Returns random arguments of the blocks."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    width = HEADS * HEAD_DIM
    sequences = [(normal(1, GRID[0] * GRID[1], width), normal(1, tokens, width)) for tokens in text_tokens]
    time = normal(1, TIME_DIM)
    cos, sin = transformer.rope(torch.empty(1, 1, GRID[0] * 2, GRID[1] * 2))
    return sequences, time, (cos.to(device), sin.to(device))


def change_error(got: Sequence[Tensor], want: Sequence[Tensor], sequences: Sequence[Tokens]) -> float:
    """Returns the relative error of the change of image tokens, of the worst sequence.

    Of the change and not of the result, most of which may be the input.
    """
    errors = []
    for ours, theirs, (image, _) in zip(got, want, sequences, strict=True):
        change = theirs.float() - image.float()
        assert change.norm() > 0.3 * image.float().norm()
        errors.append(float((ours.float() - theirs.float()).norm() / change.norm()))
    return max(errors)

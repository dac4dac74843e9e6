"""A small transformer, what its blocks are called with, and how far apart two results are."""

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
"""Than the dummies' deviation: about the inverse of the root of the blocks' width."""


class LargeTensors(RandomTensors):
    """Random weights with which blocks change their tokens by about as much as these are, and not by a rounding."""

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
    """Draws sequences and a time; returns what the blocks are called with."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    width = HEADS * HEAD_DIM
    sequences = [(draw(1, GRID[0] * GRID[1], width), draw(1, tokens, width)) for tokens in text_tokens]
    time = draw(1, TIME_DIM)
    cos, sin = transformer.rope(torch.empty(1, 1, GRID[0] * 2, GRID[1] * 2))
    return sequences, time, (cos.to(device), sin.to(device))


def change_error(got: Sequence[Tensor], want: Sequence[Tensor], sequences: Sequence[Tokens]) -> float:
    """How far what blocks changed of image tokens is from the change wanted, by its norm: of the worst sequence.

    By the change and not by the result, most of which may be what was given.
    """
    errors = []
    for ours, theirs, (image, _) in zip(got, want, sequences, strict=True):
        wanted = theirs.float() - image.float()
        assert wanted.norm() > 0.3 * image.float().norm()
        errors.append(float((ours.float() - theirs.float()).norm() / wanted.norm()))
    return max(errors)

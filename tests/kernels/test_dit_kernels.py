"""The fused blocks of the transformer against diffusers' own, in bf16."""

from __future__ import annotations

import pytest
import torch
from diffusers import GlmImageTransformer2DModel
from torch import Tensor

from glm_image.checkpoint import RandomTensors, fill
from glm_image.dit.blocks import Rotary, Tokens, eager_blocks
from glm_image.kernels.dit_blocks import ATTENTION, FusedBlocks

TEXT_TOKENS = ((6, 1), (1, 1), (3,), (0,))
GRID = (4, 6)
BF16_ERROR = 0.03


def build(device: torch.device) -> GlmImageTransformer2DModel:
    with torch.device("meta"):
        transformer = GlmImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=3,
            text_embed_dim=24,
            time_embed_dim=32,
            condition_dim=16,
            prior_vq_quantizer_codebook_size=64,
        )
    fill(transformer, RandomTensors(device, torch.bfloat16))
    return transformer


def arguments(
    transformer: GlmImageTransformer2DModel, device: torch.device, text_tokens: tuple[int, ...]
) -> tuple[list[Tokens], Tensor, Rotary]:
    """Draws sequences and a time; returns what the blocks are called with."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    width = 3 * 32
    sequences = [(draw(1, GRID[0] * GRID[1], width), draw(1, tokens, width)) for tokens in text_tokens]
    time = draw(1, 32)
    cos, sin = transformer.rope(torch.empty(1, 1, GRID[0] * 2, GRID[1] * 2))
    return sequences, time, (cos.to(device), sin.to(device))


@pytest.mark.parametrize("text_tokens", [(6, 1), (0,)])
def test_blocks_run_in_parts_give_the_same_bits(device: torch.device, text_tokens: tuple[int, ...]) -> None:
    transformer = build(device)
    sequences, *rest = arguments(transformer, device, text_tokens)
    given = [(image.clone(), text.clone()) for image, text in sequences]
    with torch.inference_mode():
        blocks = FusedBlocks(transformer)
        whole = blocks.run(range(2), sequences, *rest)
        parts = blocks.run(range(1, 2), blocks.run(range(1), sequences, *rest), *rest)
    for left, right in [*zip(parts, whole, strict=True), *zip(sequences, given, strict=True)]:
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])


@pytest.mark.parametrize("text_tokens", TEXT_TOKENS)
def test_the_blocks_are_those_of_diffusers(device: torch.device, text_tokens: tuple[int, ...]) -> None:
    transformer = build(device)
    given = arguments(transformer, device, text_tokens)
    with torch.inference_mode():
        want = eager_blocks(transformer)(*given)
        fused = FusedBlocks(transformer)
        got = fused(*given)
    assert fused.attention_backend in {*ATTENTION.values(), "native"}
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        assert error < BF16_ERROR

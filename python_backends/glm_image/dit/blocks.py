"""What runs the transformer's blocks: diffusers' own modules, or what a device has that is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from glm_image.devices import Device

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the image tokens, fp32 [image tokens, head_dim] each."""

# Runs all blocks over the sequences of a step: (image tokens and glyph tokens of each, time embedding, rotary tables)
# -> image tokens of each.
Blocks = Callable[[list[tuple[Tensor, Tensor]], Tensor, Rotary], list[Tensor]]


def eager_blocks(transformer: Any) -> Blocks:
    """Returns the blocks of diffusers' ``GlmImageTransformer2DModel``, run one after the other as they are."""

    def run(sequences: list[tuple[Tensor, Tensor]], time: Tensor, rotary: Rotary) -> list[Tensor]:
        images = []
        for image, glyphs in sequences:
            for block in transformer.transformer_blocks:
                image, glyphs = block(image, glyphs, time, rotary)  # noqa: PLW2901 - the state of the sequence
            images.append(image)
        return images

    return run


def best_blocks(transformer: Any, device: Device) -> Blocks:
    """Returns the fastest blocks the device has; ``transformer`` may be good for nothing else afterwards."""
    if device.runs_triton:
        from glm_image.kernels import dit_blocks  # noqa: PLC0415 - Triton is only where it can run

        if dit_blocks.supports(transformer):
            return dit_blocks.FusedBlocks(transformer, device.attention_backend)
    return eager_blocks(transformer)

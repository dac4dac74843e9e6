"""Selects what runs the blocks of the transformer fastest on a device."""

from __future__ import annotations

from typing import Any

from glm_image.devices.base import Device
from glm_image.dit.attention_processor import SharedAttentionProcessor, plain_attention
from glm_image.dit.blocks import Blocks, EagerBlocks, eager_blocks
from glm_image.dit.sequence_parallel import Attend, SequenceAttention


def select_blocks(transformer: Any, device: Device, shared: SequenceAttention | None = None) -> Blocks:
    """Returns the fastest blocks the device has; ``transformer`` may be good for nothing else afterwards.

    Args:
        transformer: diffusers' ``GlmImageTransformer2DModel``.
        device: where it is.
        shared: attends where several ranks share the tokens; None where they don't.
    """
    if device.runs_triton:
        from glm_image.dit.fused import blocks  # noqa: PLC0415 - Triton is only where it can run

        if blocks.supports(transformer):
            return blocks.FusedBlocks(transformer, shared)
    if shared is not None:
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(SharedAttentionProcessor(shared))
        return EagerBlocks(transformer.transformer_blocks, shared.backend)
    if device.attention_backend is not None:
        transformer.set_attention_backend(device.attention_backend)
    return eager_blocks(transformer)


def select_attention(transformer: Any, device: Device) -> tuple[Attend, str]:
    """Returns the attention of ``select_blocks`` where several ranks share the tokens, and its name in diffusers."""
    if device.runs_triton:
        from glm_image.dit.fused import blocks  # noqa: PLC0415 - Triton is only where it can run

        if blocks.supports(transformer):
            return blocks.attention, blocks.attention_backend(transformer)
    return plain_attention, "native"

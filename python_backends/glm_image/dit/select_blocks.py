"""Selects the fastest implementation of the transformer's blocks on a device."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName

from glm_image.devices.base import Device
from glm_image.dit.attention_processor import SequenceParallelProcessor, plain_attention
from glm_image.dit.blocks import Blocks, EagerBlocks, eager_blocks
from glm_image.dit.sequence_parallel import Attend, SequenceAttention


def select_blocks(transformer: Any, device: Device, attention: SequenceAttention | None = None) -> Blocks:
    """Returns the fastest blocks the device has; the transformer's own ``forward`` must not be used afterwards.

    ``attention`` attends where several ranks share the tokens; None where they do not.
    """
    if device.runs_triton:
        from glm_image.dit.fused import blocks  # noqa: PLC0415 - Triton is only where it can run

        if blocks.supports(transformer):
            return blocks.FusedBlocks(transformer, attention)
    if device.has_npu_operators and attention is None:
        from glm_image.dit.fused.npu import NpuBlocks  # noqa: PLC0415 - its operators are only where torch_npu is

        return NpuBlocks(transformer, device)
    for block in transformer.transformer_blocks:
        activation = block.ff.net[0]
        if activation.approximate == "tanh":
            activation.gelu = device.tanh_gelu
    if attention is not None:
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(SequenceParallelProcessor(attention))
        return EagerBlocks(transformer.transformer_blocks, attention.backend)
    if device.attention_backend is not None:
        # Not by set_attention_backend, which chooses for every model of the process.
        for block in transformer.transformer_blocks:
            block.attn1.processor._attention_backend = AttentionBackendName(device.attention_backend)
    return eager_blocks(transformer)


def select_attention(transformer: Any, device: Device) -> tuple[Attend, str]:
    """Returns the attention of ``select_blocks`` where several ranks share the tokens, and its name in diffusers."""
    if device.runs_triton:
        from glm_image.dit.fused import blocks  # noqa: PLC0415 - Triton is only where it can run

        if blocks.supports(transformer):
            return blocks.attention, blocks.attention_backend(transformer)
    if device.has_npu_operators:
        from glm_image.dit.fused import npu  # noqa: PLC0415 - its operators are only where torch_npu is

        return npu.attention, npu.NpuBlocks.attention_backend
    return plain_attention, "native"

"""What runs the transformer's blocks: diffusers' own modules, or what a device has that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from glm_image.devices import Device
from glm_image.dit.processor import SharedAttentionProcessor, plain_attention
from glm_image.dit.sequence import Attend, SequenceAttention
from glm_image.dit.sources import Join

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the image tokens, fp32 [image tokens, head_dim] each."""


class Blocks(Protocol):
    """Runs all blocks over the sequences of a step."""

    def __call__(
        self,
        sequences: list[tuple[Tensor, Tensor]],
        time: Tensor,
        rotary: Rotary,
        joins: Sequence[Join] | None = None,
        /,
    ) -> list[Tensor]:
        """Returns the image tokens of each sequence.

        Args:
            sequences: image tokens [1, image tokens, width] and text tokens [1, text tokens, width] of each; there may
                be no text tokens.
            time: silu(time embedding), [1, time width].
            rotary: tables of the image tokens.
            joins: for each block, what happens to the first sequence's keys and values before its attention.
        """


class _JoinedKeys:
    """A join in the form in which diffusers' attention takes it."""

    mode = "read"

    def __init__(self, join: Join) -> None:
        self.get = join


def eager_blocks(transformer: Any) -> Blocks:
    """Returns the blocks of diffusers' ``GlmImageTransformer2DModel``, run one after the other as they are."""

    def run(
        sequences: list[tuple[Tensor, Tensor]], time: Tensor, rotary: Rotary, joins: Sequence[Join] | None = None, /
    ) -> list[Tensor]:
        images = []
        caches = [_JoinedKeys(join) for join in joins] if joins else [None] * len(transformer.transformer_blocks)
        for image, glyphs in sequences:
            for block, cache in zip(transformer.transformer_blocks, caches, strict=True):
                image, glyphs = block(image, glyphs, time, rotary, kv_cache=cache)  # noqa: PLW2901 - the sequence's state
            images.append(image)
            caches = [None] * len(caches)
        return images

    return run


def best_blocks(transformer: Any, device: Device, shared: SequenceAttention | None = None) -> Blocks:
    """Returns the fastest blocks the device has; ``transformer`` may be good for nothing else afterwards.

    Args:
        transformer: diffusers' ``GlmImageTransformer2DModel``.
        device: where it is.
        shared: attends where several ranks share the tokens; None where they don't.
    """
    if device.runs_triton:
        from glm_image.kernels import dit_blocks  # noqa: PLC0415 - Triton is only where it can run

        if dit_blocks.supports(transformer):
            return dit_blocks.FusedBlocks(transformer, shared)
    if shared is not None:
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(SharedAttentionProcessor(shared))
    elif device.attention_backend is not None:
        transformer.set_attention_backend(device.attention_backend)
    return eager_blocks(transformer)


def best_attention(transformer: Any, device: Device) -> Attend:
    """Returns the attention that ``best_blocks`` uses."""
    if device.runs_triton:
        from glm_image.kernels import dit_blocks  # noqa: PLC0415 - Triton is only where it can run

        if dit_blocks.supports(transformer):
            return dit_blocks.attention
    return plain_attention

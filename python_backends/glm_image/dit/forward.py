"""One step of the transformer, given what was prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from glm_image.dit.blocks import Blocks, Tokens
from glm_image.dit.conditioning import Branch, Conditioning, SourceConditioning
from glm_image.dit.sources import SourceCache


def project_in(transformer: Any, latents: Tensor, branches: Sequence[Branch]) -> list[Tokens]:
    """Returns the tokens with which each branch enters the blocks.

    Args:
        transformer: provides the projection.
        latents: fp32 [1, channels, height, width].
        branches: the conditions of each.
    """
    patches = transformer.image_projector(latents.to(transformer.proj_out.weight.dtype))
    return [(patches + branch.prior, branch.glyphs) for branch in branches]


def project_out(transformer: Any, images: Sequence[Tensor], time: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Returns the velocity that each branch predicts, fp32 of ``shape``.

    Args:
        transformer: provides the norm and the projection.
        images: each branch's image tokens after the blocks, [1, image tokens, width].
        time: the step's embedding, [1, time width].
        shape: the latents'.
    """
    patch = transformer.config.patch_size
    return [
        unpatchify(transformer.proj_out(transformer.norm_out(image, time)), shape, patch).float() for image in images
    ]


def read_sources(transformer: Any, blocks: Blocks, sources: Sequence[SourceConditioning], cache: SourceCache) -> None:
    """Passes source images through the blocks, which leave their keys and values in ``cache``.

    Args:
        transformer: provides the projection in.
        blocks: what they pass through.
        sources: in order.
        cache: holds the image tokens of all of them.
    """
    start = 0
    for source in sources:
        image = transformer.image_projector(source.latents) + source.prior
        no_text = image[:, :0]
        blocks([(image, no_text)], source.time, source.rotary, cache.recorders(start))
        start += image.shape[1]


def unpatchify(tokens: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """Lays tokens [batch, tokens, channels * patch * patch] out as latents of ``shape``."""
    batch, _, height, width = shape
    grid = tokens.reshape(batch, height // patch, width // patch, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def euler_step(
    latents: Tensor, velocities: Sequence[Tensor], guidance_scale: float, step: Tensor, sigmas: Tensor
) -> Tensor:
    """Takes one Euler step of the flow (Lipman et al., 2023).

    Args:
        latents: fp32 [1, channels, height, width].
        velocities: the conditional branch's, and the unconditional one's if there is guidance, as ``latents``.
        guidance_scale: how far from the one to the other.
        step: int64 [1], index of the step: on the device, so that a captured step can count.
        sigmas: fp32 [steps + 1].

    Returns:
        fp32 latents at the next noise level.
    """
    velocity, *rest = velocities
    for without in rest:  # classifier-free guidance (Ho and Salimans, 2022)
        velocity = without + guidance_scale * (velocity - without)
    change = sigmas.index_select(0, step + 1) - sigmas.index_select(0, step)
    return latents + change * velocity


def denoise_step(
    transformer: Any, blocks: Blocks, latents: Tensor, conditioning: Conditioning, step: Tensor, sigmas: Tensor
) -> Tensor:
    """Predicts the velocity of the latents and takes a step along it.

    Args:
        transformer: provides the projections in and out.
        blocks: what is between them.
        latents: see ``euler_step``.
        conditioning: the picture's.
        step: see ``euler_step``.
        sigmas: see ``euler_step``.

    Returns:
        See ``euler_step``.
    """
    time, sources = conditioning.times.index_select(0, step), conditioning.sources
    sequences = project_in(transformer, latents, conditioning.branches)
    images = blocks(sequences, time, conditioning.rotary, sources.readers() if sources else None)
    velocities = project_out(transformer, images, time, latents.shape)
    return euler_step(latents, velocities, conditioning.guidance_scale, step, sigmas)

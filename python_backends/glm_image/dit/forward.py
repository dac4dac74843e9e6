"""One step of the transformer, given what was prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from glm_image.dit.blocks import Blocks, Tokens
from glm_image.dit.conditioning import Branch, Conditioning, SourceConditioning
from glm_image.dit.parallel_context import SINGLE_RANK, ParallelContext
from glm_image.dit.source_kv import SourceCache


def project_in(
    transformer: Any, latents: Tensor, branches: Sequence[Branch], sharing: ParallelContext = SINGLE_RANK
) -> list[Tokens]:
    """Returns this rank's tokens with which each of its branches enters the blocks.

    Args:
        transformer: provides the projection.
        latents: fp32 [1, channels, height, width].
        branches: the conditions of each, as ``ParallelContext.own_conditioning`` gives them.
        sharing: which of the tokens are this rank's.
    """
    patches = transformer.image_projector(latents.to(transformer.proj_out.weight.dtype))
    own = sharing.own(patches, dim=1)
    return [(own + branch.prior, branch.glyphs) for branch in branches]


def project_out(
    transformer: Any,
    images: Sequence[Tensor],
    time: Tensor,
    shape: tuple[int, ...],
    sharing: ParallelContext = SINGLE_RANK,
    *,
    guided: bool = False,
) -> list[Tensor]:
    """Returns the velocity that every branch predicts, fp32 of ``shape``.

    Args:
        transformer: provides the norm and the projection.
        images: image tokens of this rank's branches after the blocks, [1, image tokens, width].
        time: the step's embedding, [1, time width].
        shape: the latents'.
        sharing: whose the other tokens and branches are.
        guided: whether there are two branches.
    """
    patch = transformer.config.patch_size
    tokens = shape[2] * shape[3] // patch**2
    velocities = []
    for image in images:
        projected = sharing.whole(transformer.proj_out(transformer.norm_out(image, time)), tokens)
        velocities.append(unpatchify(projected, shape, patch).float())
    return sharing.all_branches(velocities, guided=guided)


def read_sources(
    transformer: Any,
    blocks: Blocks,
    sources: Sequence[SourceConditioning],
    cache: SourceCache,
    sharing: ParallelContext = SINGLE_RANK,
) -> None:
    """Passes source images through the blocks, which leave their keys and values in ``cache``.

    Args:
        transformer: provides the projection in.
        blocks: what they pass through.
        sources: in order.
        cache: holds the image tokens of all of them.
        sharing: which of the tokens are this rank's.
    """
    start = 0
    for source in sources:
        image = transformer.image_projector(source.latents) + source.prior
        no_text = image[:, :0]
        sharing.begin(image.shape[1])
        own = sharing.own(image, dim=1)
        blocks([(own, no_text)], source.time, sharing.own_rotary(source.rotary), cache.recorders(start))
        start += len(sharing.ranks.ring.shard_range(image.shape[1]))


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
    transformer: Any,
    blocks: Blocks,
    latents: Tensor,
    conditioning: Conditioning,
    step: Tensor,
    sigmas: Tensor,
    sharing: ParallelContext = SINGLE_RANK,
) -> Tensor:
    """Predicts the velocity of the latents and takes a step along it.

    Args:
        transformer: provides the projections in and out.
        blocks: what is between them.
        latents: see ``euler_step``.
        conditioning: the picture's, as ``ParallelContext.own_conditioning`` gives it.
        step: see ``euler_step``.
        sigmas: see ``euler_step``.
        sharing: what of it is this rank's.

    Returns:
        See ``euler_step``.
    """
    time, sources = conditioning.times.index_select(0, step), conditioning.sources
    sequences = project_in(transformer, latents, conditioning.branches, sharing)
    sharing.begin_picture(conditioning)
    images = blocks(sequences, time, conditioning.rotary, sources.readers() if sources else None)
    velocities = project_out(transformer, images, time, latents.shape, sharing, guided=conditioning.guided)
    return euler_step(latents, velocities, conditioning.guidance_scale, step, sigmas)

"""One step of the transformer, given what was prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from glm_image.dit.blocks import Blocks, Rotary
from glm_image.dit.conditioning import Branch, Conditioning, SourceConditioning
from glm_image.dit.sequence import NOT_SHARED, Sharing
from glm_image.dit.sources import SourceCache


def predict_velocities(
    transformer: Any,
    blocks: Blocks,
    latents: Tensor,
    branches: list[Branch],
    time: Tensor,
    rotary: Rotary,
    sources: SourceCache | None = None,
    sharing: Sharing = NOT_SHARED,
) -> list[Tensor]:
    """Predicts the velocity of the latents for each branch.

    Args:
        transformer: provides the projections in and out.
        blocks: what is between them.
        latents: [1, channels, height, width] in the model's dtype.
        branches: the conditions of each.
        time: the step's embedding, [1, time width].
        rotary: rotary tables of the image tokens.
        sources: what the first branch reads of source images.
        sharing: which of the tokens are this rank's.

    Returns:
        fp32, each shaped as ``latents``.
    """
    patches = transformer.image_projector(latents)
    count, patch = patches.shape[1], transformer.config.patch_size
    sequences = [(sharing.own(patches + branch.prior, dim=1), branch.glyphs) for branch in branches]
    sharing.begin(count, sources.tokens if sources else ())
    images = blocks(sequences, time, _own_rotary(rotary, sharing), sources.readers() if sources else None)
    velocities = [transformer.proj_out(transformer.norm_out(image, time)) for image in images]
    return [unpatchify(sharing.whole(own, count), latents.shape, patch).float() for own in velocities]


def _own_rotary(rotary: Rotary, sharing: Sharing) -> Rotary:
    cos, sin = (sharing.own(table, dim=0) for table in rotary)
    return cos, sin


def read_sources(
    transformer: Any,
    blocks: Blocks,
    sources: Sequence[SourceConditioning],
    cache: SourceCache,
    sharing: Sharing = NOT_SHARED,
) -> None:
    """Passes source images through the blocks, which leave their keys and values in ``cache``.

    Args:
        transformer: see ``predict_velocities``.
        blocks: see ``predict_velocities``.
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
        blocks([(own, no_text)], source.time, _own_rotary(source.rotary, sharing), cache.recorders(start))
        start += len(sharing.ranks.ring.share(image.shape[1]))


def unpatchify(tokens: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """Lays tokens [batch, tokens, channels * patch * patch] out as latents of ``shape``."""
    batch, _, height, width = shape
    grid = tokens.reshape(batch, height // patch, width // patch, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def denoise_step(
    transformer: Any,
    blocks: Blocks,
    latents: Tensor,
    conditioning: Conditioning,
    step: Tensor,
    sigmas: Tensor,
    sharing: Sharing = NOT_SHARED,
) -> Tensor:
    """Takes one Euler step of the flow (Lipman et al., 2023).

    Args:
        transformer: see ``predict_velocities``.
        blocks: see ``predict_velocities``.
        latents: fp32 [1, channels, height, width].
        conditioning: the picture's.
        step: int64 [1], index of the step: on the device, so that a captured step can count.
        sigmas: fp32 [steps + 1].
        sharing: which of the branches and tokens are this rank's.

    Returns:
        fp32 latents at the next noise level.
    """
    branches, sources = [conditioning.conditional], conditioning.sources
    if conditioning.unconditional is not None:
        branches.append(conditioning.unconditional)
    of_branches = sharing.ranks.cfg
    split = of_branches.size == len(branches) > 1
    velocities = predict_velocities(
        transformer,
        blocks,
        latents.to(transformer.proj_out.weight.dtype),
        [branches[of_branches.rank]] if split else branches,
        conditioning.times.index_select(0, step),
        conditioning.rotary,
        None if split and of_branches.rank > 0 else sources,
        sharing,
    )
    velocity, *rest = of_branches.gather(velocities[0]) if split else velocities
    for without in rest:  # classifier-free guidance (Ho and Salimans, 2022)
        velocity = without + conditioning.guidance_scale * (velocity - without)
    change = sigmas.index_select(0, step + 1) - sigmas.index_select(0, step)
    return latents + change * velocity

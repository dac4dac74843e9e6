"""One step of the transformer, given what was prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from glm_image.dit.blocks import Blocks, Rotary
from glm_image.dit.conditioning import Branch, Conditioning, SourceConditioning
from glm_image.dit.sources import SourceCache


def predict_velocities(
    transformer: Any,
    blocks: Blocks,
    latents: Tensor,
    branches: list[Branch],
    time: Tensor,
    rotary: Rotary,
    sources: SourceCache | None = None,
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

    Returns:
        fp32, each shaped as ``latents``.
    """
    patches = transformer.image_projector(latents)
    sequences = [(patches + branch.prior, branch.glyphs) for branch in branches]
    images = blocks(sequences, time, rotary, sources.readers() if sources else None)
    patch = transformer.config.patch_size
    return [
        unpatchify(transformer.proj_out(transformer.norm_out(image, time)), latents.shape, patch).float()
        for image in images
    ]


def read_sources(transformer: Any, blocks: Blocks, sources: Sequence[SourceConditioning], cache: SourceCache) -> None:
    """Passes source images through the blocks, which leave their keys and values in ``cache``.

    Args:
        transformer: see ``predict_velocities``.
        blocks: see ``predict_velocities``.
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


def denoise_step(
    transformer: Any, blocks: Blocks, latents: Tensor, conditioning: Conditioning, step: Tensor, sigmas: Tensor
) -> Tensor:
    """Takes one Euler step of the flow (Lipman et al., 2023).

    Args:
        transformer: see ``predict_velocities``.
        blocks: see ``predict_velocities``.
        latents: fp32 [1, channels, height, width].
        conditioning: the picture's.
        step: int64 [1], index of the step: on the device, so that a captured step can count.
        sigmas: fp32 [steps + 1].

    Returns:
        fp32 latents at the next noise level.
    """
    model_input = latents.to(transformer.proj_out.weight.dtype)
    branches = [conditioning.conditional]
    if conditioning.unconditional is not None:
        branches.append(conditioning.unconditional)
    velocity, *rest = predict_velocities(
        transformer,
        blocks,
        model_input,
        branches,
        conditioning.times.index_select(0, step),
        conditioning.rotary,
        conditioning.sources,
    )
    for without in rest:  # classifier-free guidance (Ho and Salimans, 2022)
        velocity = without + conditioning.guidance_scale * (velocity - without)
    change = sigmas.index_select(0, step + 1) - sigmas.index_select(0, step)
    return latents + change * velocity

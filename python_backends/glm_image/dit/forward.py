"""One prediction of the transformer, given what was prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from glm_image.dit.conditioning import Branch, Conditioning

# Runs all blocks: (image tokens, glyph tokens, time embedding, rotary tables) -> image tokens. Eager, compiled,
# captured or cached: whoever provides it decides.
Blocks = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]


def eager_blocks(transformer: Any) -> Blocks:
    """Returns the blocks of diffusers' ``GlmImageTransformer2DModel``, run one after the other."""

    def run(image: Tensor, glyphs: Tensor, time: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        for block in transformer.transformer_blocks:
            image, glyphs = block(image, glyphs, time, rotary)
        return image

    return run


def predict_velocity(
    transformer: Any, blocks: Blocks, latents: Tensor, branch: Branch, time: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Predicts the velocity of the latents for one branch.

    Args:
        transformer: provides the projections in and out.
        blocks: what is between them.
        latents: [1, channels, height, width] in the model's dtype.
        branch: the branch's conditions.
        time: the step's embedding, [1, time width].
        rotary: rotary tables of the image tokens.

    Returns:
        fp32, shaped as ``latents``.
    """
    image = transformer.image_projector(latents) + branch.prior
    image = transformer.proj_out(transformer.norm_out(blocks(image, branch.glyphs, time, rotary), time))
    return unpatchify(image, latents.shape, transformer.config.patch_size).float()


def unpatchify(tokens: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """Lays tokens [batch, tokens, channels * patch * patch] out as latents of ``shape``."""
    batch, _, height, width = shape
    grid = tokens.reshape(batch, height // patch, width // patch, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def denoise_step(
    transformer: Any, blocks: Blocks, latents: Tensor, conditioning: Conditioning, step: int, sigmas: Tensor
) -> Tensor:
    """Takes one Euler step of the flow (Lipman et al., 2023).

    Args:
        transformer: see ``predict_velocity``.
        blocks: see ``predict_velocity``.
        latents: [1, channels, height, width]; the model's dtype at first, fp32 afterwards.
        conditioning: the picture's.
        step: index of the step.
        sigmas: fp32 [steps + 1].

    Returns:
        fp32 latents at the next noise level.
    """
    model_input = latents.to(transformer.proj_out.weight.dtype)
    time, rotary = conditioning.times[step], conditioning.rotary
    velocity = predict_velocity(transformer, blocks, model_input, conditioning.conditional, time, rotary)
    if conditioning.unconditional is not None:
        without = predict_velocity(transformer, blocks, model_input, conditioning.unconditional, time, rotary)
        velocity = without + conditioning.guidance_scale * (velocity - without)
    return latents.float() + (sigmas[step + 1] - sigmas[step]) * velocity

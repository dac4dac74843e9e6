"""Renders latents at their own size by a linear map (ComfyUI: latent2rgb), for previews of an image being denoised.

Each latent is mapped to the mean colour of the square of pixels that it encodes. Weights and bias minimise the squared
error over the latents z_i and mean colours c_i of a fixed set of synthetic images:

    sum_i |z_i W + b - c_i|^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 256
PATCH = 32
WAVES = 4


@dataclass(frozen=True)
class LatentPreview:
    """The linear map: weight fp32 [channels, 3] and bias fp32 [3]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, latents: Tensor) -> NDArray[np.uint8]:
        """Returns uint8 [H/8, W/8, 3] of normalised latents fp32 [1, channels, H/8, W/8]."""
        colours = latents[0].permute(1, 2, 0).float() @ self.weight + self.bias
        pixels: NDArray[np.uint8] = colours.clamp(0, 255).round().to(torch.uint8).cpu().numpy()
        return pixels


def fit(encode: Callable[[NDArray[np.uint8]], Tensor]) -> LatentPreview:
    """Fits the map to an encoder, from uint8 [H, W, 3] to normalised latents [1, channels, H/8, W/8]."""
    latents, colours = [], []
    for pixels in _images():
        encoded = encode(pixels)
        _, channels, height, width = encoded.shape
        latents.append(encoded[0].permute(1, 2, 0).reshape(-1, channels).double().cpu().numpy())
        squares = pixels.reshape(height, SIDE // height, width, SIDE // width, 3)
        colours.append(squares.mean(axis=(1, 3)).reshape(-1, 3))
    rows = np.concatenate(latents)
    with_ones = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(with_ones, np.concatenate(colours), rcond=None)
    parameters = torch.from_numpy(solution).to(encoded.device, torch.float32)
    return LatentPreview(weight=parameters[:-1], bias=parameters[-1])


def _images() -> list[NDArray[np.uint8]]:
    """Returns an image of uniform patches and one of smooth gradients."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (SIDE // PATCH, SIDE // PATCH, 3), dtype=np.uint8)
    flat = patches.repeat(PATCH, axis=0).repeat(PATCH, axis=1)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    gradient = np.zeros((SIDE, SIDE, 3))
    for channel in range(3):
        for _ in range(WAVES):
            across, down, phase = rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(0, 2 * np.pi)
            gradient[..., channel] += np.cos(2 * np.pi * (across * columns + down * rows) + phase)
    smooth = 127.5 + 127.5 * gradient / np.abs(gradient).max(axis=(0, 1))
    return [flat, smooth.round().astype(np.uint8)]

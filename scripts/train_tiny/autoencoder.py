"""Stage vae: images to 16 channels at an eighth of the size, and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from glm_image.request.geometry import Size
from train_tiny.compilation import compiled
from train_tiny.data import MAIN_SIZE, Choice, Samples, render
from train_tiny.models import build_vae, signed
from train_tiny.world.table import Table

DIVERGENCE_WEIGHT = 1e-4
LEAST_SHARE = 0.2
"""Lower bound of a channel's deviation, relative to the largest; smaller channels are not scaled up to 1."""


class Autoencoder:
    """Trains on pixels and on their horizontal and vertical differences (edges)."""

    name = "vae"
    learning_rate = 1e-3
    inner = ()

    def __init__(self, samples: Sequence[Samples], device: torch.device, batch: int, seed: int) -> None:
        self.module = nn.ModuleDict({"vae": build_vae()}).to(device, memory_format=torch.channels_last)
        self._device, self._batch = device, batch
        vae = self.module["vae"]
        self._encode = compiled(vae.encoder, device, dynamic=False)
        self._decode = compiled(vae.decoder, device, dynamic=False)
        self._pictures = sheets(samples[0].scenes, device)
        self._choice = Choice([len(self._pictures)], seed)

    def _sample(self) -> Tensor:
        return signed(self._pictures[self._choice.rows(0, self._batch, self._device)])

    def kind(self) -> int:
        return 0

    def losses(self, kind: int) -> dict[str, Tensor]:
        """Samples a batch and returns its losses."""
        pictures = self._sample()
        posterior = DiagonalGaussianDistribution(self._encode(pictures).float())
        decoded = self._decode(posterior.sample()).float()
        pixels = F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures)
        edges = sum(F.l1_loss(decoded.diff(dim=side), pictures.diff(dim=side)) for side in (2, 3))
        divergence = -0.5 * (1 + posterior.logvar - posterior.mean.square() - posterior.logvar.exp()).float().mean()
        loss = pixels + edges + DIVERGENCE_WEIGHT * divergence
        return {"loss": loss, "pixels": pixels, "edges": edges, "divergence": divergence}

    def after_step(self, step: int, progress: float) -> None:
        """Does nothing."""

    @torch.no_grad()
    def results(self) -> dict[str, Any]:
        """Returns the latents' means and deviations, and the PSNR of reconstructions."""
        vae, latents, error = self.module["vae"], [], []
        for _ in range(16):
            pictures = self._sample()
            mode = vae.encode(pictures).latent_dist.mode()
            latents.append(mode.transpose(0, 1).flatten(1))
            error.append((vae.decode(mode).sample.clamp(-1, 1) - pictures).square().mean() / 4)
        values = torch.cat(latents, dim=1)
        deviation = values.std(dim=1)
        return {
            "latents_mean": [round(float(v), 4) for v in values.mean(dim=1)],
            "latents_std": [round(float(v), 4) for v in deviation.clamp(min=LEAST_SHARE * float(deviation.max()))],
            "psnr": float(-10 * torch.stack(error).mean().log10()),
        }


def sheets(scenes: Table, device: torch.device) -> Tensor:
    """Renders images of the main size only, so that there is one batch shape: uint8 [n, 3, 256, 256].

    Of every twelve, six show a scene of that size, two a quarter of a scene of twice the size, two a corner of one of
    1.5 times the size, and two show four scenes of half the size.
    """
    height, width = MAIN_SIZE
    bounds = [scenes.length // 12 * twelfths for twelfths in (0, 6, 8, 10, 12)]
    whole, double, larger, small = (scenes.rows(slice(*ends)) for ends in pairwise(bounds))
    parts = [*render(whole, MAIN_SIZE, device)]
    for others, size in ((double, Size(2 * height, 2 * width)), (larger, Size(3 * height // 2, 3 * width // 2))):
        for pictures in render(others, size, device):
            # Alternates between the corners.
            top, left = size.height - height, size.width - width
            corners = [(0, 0), (top, 0), (0, left), (top, left)]
            parts += [pictures[n::4, :, y : y + height, x : x + width].contiguous() for n, (y, x) in enumerate(corners)]
    for pictures in render(small, Size(height // 2, width // 2), device):
        fours = pictures[: len(pictures) // 4 * 4].unflatten(0, (-1, 2, 2))
        parts.append(fours.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, height, width))
    return torch.cat(parts)

"""Stage 1, the VAE: pictures to 16 channels at an eighth of the size, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_tiny.data import Choice, Item, by_size, drawn
from train_tiny.models import build_vae, signed

DIVERGENCE_WEIGHT = 1e-4
LEAST_SHARE = 0.2
"""Of the largest channel's deviation: channels below are not blown up to a deviation of 1."""


class Autoencoder:
    """Trains on the pictures' pixels and on their differences to the right and down, which are the edges."""

    name = "vae"
    learning_rate = 1e-3

    def __init__(self, items: list[Item], device: torch.device, batch: int, seed: int) -> None:
        self.module = nn.ModuleDict({"vae": build_vae()}).to(device, memory_format=torch.channels_last)
        self._device, self._batch = device, batch
        sized = list(by_size(items, main_share=0.6))
        self._pictures = [torch.cat(list(drawn([i.scene for i in own], size, device))) for size, own in sized]
        self._choice = Choice([len(own) for _, own in sized], seed)

    def _draw(self) -> Tensor:
        group = self._choice.group()
        pictures = self._pictures[group]
        count = max(2, self._batch * 256 * 256 // pictures[0, 0].numel())
        return signed(pictures[self._choice.rows(group, count, self._device)])

    def losses(self, progress: float) -> dict[str, Tensor]:
        """Draws a batch."""
        pictures = self._draw()
        posterior = self.module["vae"].encode(pictures).latent_dist
        made = self.module["vae"].decode(posterior.sample()).sample.float()
        pixels = F.l1_loss(made, pictures) + F.mse_loss(made, pictures)
        edges = sum(F.l1_loss(made.diff(dim=side), pictures.diff(dim=side)) for side in (2, 3))
        divergence = -0.5 * (1 + posterior.logvar - posterior.mean.square() - posterior.logvar.exp()).float().mean()
        loss = pixels + edges + DIVERGENCE_WEIGHT * divergence
        return {"loss": loss, "pixels": pixels, "edges": edges, "divergence": divergence}

    def after_step(self, step: int) -> None:
        """Nothing is left to do."""

    @torch.no_grad()
    def results(self) -> dict[str, Any]:
        """The latents' means and deviations, and how near pictures come back."""
        vae, latents, error = self.module["vae"], [], []
        for _ in range(16):
            pictures = self._draw()
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

"""The VAE: from latents to pixels, and from pixels to latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.devices.base import Device
from glm_image.dit import latent_preview
from glm_image.dit.fused.vae import fuse_norms


class Vae:
    """A checkpoint's variational autoencoder; decodes and encodes one image at a time.

    Args:
        autoencoder: diffusers' ``AutoencoderKL``; its config has the mean and deviation of each latent channel.
        tiling: splits images with a side above the config's ``sample_size`` into overlapping tiles, which are blended.
            That takes less memory, but the norms see one tile each, which changes the image.

    Attributes:
        preview: renders latents at their own size, cheaply; see ``dit.latent_preview``.
    """

    def __init__(self, autoencoder: Any, device: Device, *, tiling: bool = False) -> None:
        weight = autoencoder.decoder.conv_in.weight
        if tiling:
            autoencoder.enable_tiling()
        _fuse(autoencoder, device, weight.dtype)
        # An NPU has no channels-last layout.
        self._format = torch.contiguous_format if device.has_npu_operators else torch.preserve_format
        self._autoencoder = autoencoder
        self._dtype: torch.dtype = weight.dtype
        self._mean, self._std = (
            torch.tensor(values, device=weight.device, dtype=weight.dtype).view(1, -1, 1, 1)
            for values in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
        )

        with torch.inference_mode():
            self.preview = latent_preview.fit(self.encode)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decodes normalised latents [1, channels, H/8, W/8] to an image uint8 [H, W, 3] on the host."""
        scaled = latents.to(self._dtype) * self._std + self._mean
        decoded = self._autoencoder.decode(scaled, return_dict=False)[0][0]
        levels = (decoded * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
        pixels: NDArray[np.uint8] = levels.permute(1, 2, 0).cpu().numpy()
        return pixels

    def encode(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Encodes an image uint8 [H, W, 3], sides multiples of 32, to normalised latents [1, channels, H/8, W/8].

        They are the mode of the distribution: nothing is sampled.
        """
        # Channels stay last in memory, as in the reference: otherwise convolutions sum in another order.
        levels = torch.from_numpy(pixels[None].astype(np.float32) / 255.0).permute(0, 3, 1, 2)
        encoded = self._autoencoder.encode(
            (2.0 * levels - 1.0).to(self._mean.device, self._dtype, memory_format=self._format)
        )
        latents: Tensor = (encoded.latent_dist.mode() - self._mean) / self._std
        return latents


def _fuse(autoencoder: Any, device: Device, dtype: torch.dtype) -> None:
    """Fuses the norms of an autoencoder with their activations where the device can."""
    if device.has_npu_operators:
        from glm_image.dit.fused.npu import GroupNormSilu as NpuGroupNormSilu  # noqa: PLC0415 - needs torch_npu

        fuse_norms(autoencoder, NpuGroupNormSilu)
    elif device.runs_triton and dtype == torch.bfloat16:
        from glm_image.dit.fused.group_norm import GroupNormSilu  # noqa: PLC0415 - Triton is only where it can run

        fuse_norms(autoencoder, GroupNormSilu)
        autoencoder.to(memory_format=torch.channels_last)

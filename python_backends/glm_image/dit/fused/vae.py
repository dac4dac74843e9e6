"""diffusers' VAE with its group norms and SiLUs fused; the reference implementation is diffusers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm_image.kernels.group_norm_silu import group_norm_silu


class GroupNormSilu(nn.Module):
    """A group norm followed by its SiLU."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, image: Tensor) -> Tensor:
        """Normalises and activates bf16 [1, channels, height, width]."""
        norm, image = self._norm, image.contiguous(memory_format=torch.channels_last)
        return group_norm_silu(image, norm.weight, norm.bias, norm.num_groups, norm.eps)


def fuse_norms(autoencoder: Any) -> None:
    """Fuses the group norms of diffusers' ``AutoencoderKL`` with the SiLUs after them, and makes it channels-last."""
    for part in list(autoencoder.modules()):
        if isinstance(getattr(part, "nonlinearity", None), nn.SiLU):  # a residual block
            part.norm1, part.norm2 = GroupNormSilu(part.norm1), GroupNormSilu(part.norm2)
            part.nonlinearity = nn.Identity()
        elif isinstance(getattr(part, "conv_act", None), nn.SiLU):  # the end of the encoder and of the decoder
            part.conv_norm_out, part.conv_act = GroupNormSilu(part.conv_norm_out), nn.Identity()
    autoencoder.to(memory_format=torch.channels_last)

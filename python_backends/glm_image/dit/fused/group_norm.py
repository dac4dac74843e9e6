"""A group norm with its SiLU in one kernel, for the VAE."""

from __future__ import annotations

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

"""diffusers' VAE with each group norm and the SiLU after it in one module; the reference is diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def fuse_norms(autoencoder: Any, fused: Callable[[nn.GroupNorm], nn.Module]) -> None:
    """Replaces the group norms of diffusers' ``AutoencoderKL`` and the SiLUs after them by ``fused``."""
    for part in list(autoencoder.modules()):
        if isinstance(getattr(part, "nonlinearity", None), nn.SiLU):  # a residual block
            part.norm1, part.norm2 = fused(part.norm1), fused(part.norm2)
            part.nonlinearity = nn.Identity()
        elif isinstance(getattr(part, "conv_act", None), nn.SiLU):  # the end of the encoder and of the decoder
            part.conv_norm_out, part.conv_act = fused(part.conv_norm_out), nn.Identity()

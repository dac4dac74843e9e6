"""The settings of the DiT."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm_image.dit.cache import CacheSettings
from glm_image.request.geometry import Size


@dataclass(frozen=True)
class DitSettings:
    """The settings of the DiT.

    Attributes:
        dtype: None = the device's default.
        memory_utilization: share of the device's memory this stage may use.
        warmup_sizes: sizes rendered once at load, so that the first request of such a size is as fast as later ones.
        parallel: how an instance on several devices shares a step; see ``ParallelLayout.parse``.
        cache: the residual cache; None = exact steps.
        quantization: ``int8`` or ``fp8`` for the products of the transformer's blocks, or ``none``.
        vae_tiling: whether the VAE splits large images into tiles: ``off``, ``on``, or ``auto``, which is on where the
            largest image would not fit without tiles.
        largest_side: of an image, in pixels.
    """

    dtype: torch.dtype | None = None
    memory_utilization: float = 0.9
    warmup_sizes: tuple[Size, ...] = ()
    parallel: str = "auto"
    cache: CacheSettings | None = None
    quantization: str = "none"
    vae_tiling: str = "off"
    largest_side: int = 2048

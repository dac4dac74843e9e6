"""How the second stage runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm_image.geometry import Size


@dataclass(frozen=True)
class DitSettings:
    """How the second stage runs.

    Attributes:
        dtype: None = the device's default.
        memory_utilization: share of the device's memory this stage may use.
        parallel: how an instance on several devices shares a step; see ``ParallelLayout.parse``.
        warmup_sizes: sizes painted once at load, so that the first request of such a size is as fast as later ones.
    """

    dtype: torch.dtype | None = None
    memory_utilization: float = 0.9
    parallel: str = "auto"
    warmup_sizes: tuple[Size, ...] = ()

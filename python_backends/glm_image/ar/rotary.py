"""M-RoPE: each frequency belongs to the time, the row or the column of a token."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.ar.config import ArConfig


def rotary_tables(
    config: ArConfig, positions: NDArray[np.int64], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines, [tokens, rotary_dim] each in ``dtype``, computed in fp32.

    ``positions`` is int64 [3, tokens]: axes T, H, W.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    frequencies = 1.0 / (config.rotary_theta**exponents)
    angles = torch.from_numpy(positions).float()[:, :, None] * frequencies
    runs = torch.split(angles, list(config.mrope_section), dim=-1)
    mixed = torch.cat([run[index % 3] for index, run in enumerate(runs)], dim=-1)
    both_halves = torch.cat([mixed, mixed], dim=-1)
    return both_halves.cos().to(device, dtype), both_halves.sin().to(device, dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the leading channels of heads [..., head_dim] by their position (Su et al., 2021), halves paired.

    ``cos`` and ``sin`` are [..., rotary_dim], broadcast over heads.
    """
    rotary, passthrough = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat([rotary * cos + torch.cat([-second, first], dim=-1) * sin, passthrough], dim=-1)

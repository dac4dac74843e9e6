"""Keys and values of every slot, at fixed addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_image.ar.config import ArConfig


class KvCache:
    """A static cache: it is allocated once, so that a captured step can use it.

    Attributes:
        keys: [layers, slots, kv_heads, positions, head_dim].
        values: as ``keys``.
    """

    def __init__(self, config: ArConfig, slots: int, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.layers, slots, config.kv_heads, positions, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def write_prompt(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Writes a prompt's keys and values [kv_heads, tokens, head_dim] from position 0."""
        self.keys[layer, slot, :, : keys.shape[1]] = keys
        self.values[layer, slot, :, : values.shape[1]] = values

    def append(
        self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes tokens [rows, kv_heads, head_dim] at ``slots`` and ``positions``; returns the layer's cache."""
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values
        return self.keys[layer], self.values[layer]

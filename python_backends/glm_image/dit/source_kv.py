"""Keys and values of source images in every block of the transformer, which the conditional branch attends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm_image.parallel.process_group import ONE_RANK, Ranks

KvHook = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Receives the keys and values, [1, tokens, heads, head_dim] each, that a block has computed; returns those that its
attention reads."""


class SourceCache:
    """This rank's keys (after rotation) and values of the image tokens of a request's sources, one after the other.

    ``tokens`` has the image tokens of each source; each passes through the blocks once.
    """

    def __init__(
        self, config: Any, tokens: Sequence[int], device: torch.device, dtype: torch.dtype, ranks: Ranks = ONE_RANK
    ) -> None:
        self.tokens = tuple(tokens)
        shard = sum(len(ranks.ring.shard_range(count)) for count in tokens)
        heads = config.num_attention_heads // (ranks.tp.size * ranks.ulysses.size)
        shape = (config.num_layers, 1, shard, heads, config.attention_head_dim)
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty(shape, device=device, dtype=dtype)

    def recorders(self, start: int) -> list[KvHook]:
        """Returns for each block a hook that stores the keys and values of a source whose tokens begin at ``start``."""
        return [partial(self._record, block, start) for block in range(len(self._keys))]

    def readers(self) -> list[KvHook]:
        """Returns for each block a hook that puts the sources' keys and values before those of the image."""
        return [partial(self._read, block) for block in range(len(self._keys))]

    def _record(self, block: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        own = slice(start, start + keys.shape[1])
        self._keys[block, :, own] = keys
        self._values[block, :, own] = values
        return keys, values

    def _read(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self._keys[block], keys], dim=1), torch.cat([self._values[block], values], dim=1)

"""The state of a decode step: tensors at fixed addresses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm_image.ar.config import NOISE_BLOCK, ArConfig
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.sampler import SamplerRows, allowed_ids


@dataclass(frozen=True)
class DecodeState:
    """The slots of a fixed batch.

    Attributes:
        tokens: int64 [slots], the last sampled token.
        lengths: int64 [slots], filled positions of the cache, which is where the last token goes next.
        sampled: int64 [slots], number of tokens sampled so far.
        counters: int64 [2, slots]: ``lengths`` and ``sampled``, which advance together.
        active: int64 [slots], 1 for an active slot, 0 for an idle one.
        output: int64 [slots, positions], the sampled tokens.
        cos: [slots, positions, rotary_dim], by position in the cache.
        sin: as ``cos``.
        noise: fp32 [slots, NOISE_BLOCK, vision_vocab_size], of which a step uses row ``sampled % NOISE_BLOCK``.
        allowed: bool [2, vision_vocab_size]: the ids allowed in the preview, and in the image's own grid.
    """

    tokens: Tensor
    lengths: Tensor
    sampled: Tensor
    counters: Tensor
    active: Tensor
    output: Tensor
    cos: Tensor
    sin: Tensor
    noise: Tensor
    sampler: SamplerRows
    allowed: Tensor
    cache: KvCache

    @classmethod
    def idle(
        cls, config: ArConfig, slots: int, positions: int, device: torch.device, dtype: torch.dtype
    ) -> DecodeState:
        tokens, active = torch.zeros(2, slots, device=device, dtype=torch.int64)
        counters = torch.zeros(2, slots, device=device, dtype=torch.int64)
        cos, sin = torch.zeros(2, slots, positions, config.rotary_dim, device=device, dtype=dtype)
        return cls(
            tokens=tokens,
            lengths=counters[0],
            sampled=counters[1],
            counters=counters,
            active=active,
            output=torch.zeros(slots, positions, device=device, dtype=torch.int64),
            cos=cos,
            sin=sin,
            noise=torch.ones(slots, NOISE_BLOCK, config.vision_vocab_size, device=device),
            sampler=SamplerRows.empty(slots, device),
            allowed=allowed_ids(config, device),
            cache=KvCache(config, slots, positions, device, dtype),
        )

    def set(self, slot: int, length: int, sampled: int, active: bool) -> None:
        """Sets a slot's counters after the steps under way, without waiting for them.

        Uses ``fill_``, since an assigned number is copied from the host, which waits for the device.
        """
        for tensor, value in ((self.lengths, length), (self.sampled, sampled), (self.active, int(active))):
            tensor[slot].fill_(value)

    def advance(self, rows: Tensor) -> None:
        """Stores the tokens just sampled and advances the active slots; ``rows`` is int64 [slots], 0 and up."""
        self.output[rows, self.sampled] = self.tokens
        self.counters.add_(self.active)

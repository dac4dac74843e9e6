"""What a decode step reads and writes: tensors that stay where they are."""

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
        tokens: int64 [slots], the last token drawn.
        lengths: int64 [slots], positions in the cache; where the last token goes next.
        drawn: int64 [slots], tokens drawn so far.
        active: int64 [slots], 1 for a slot that moves on, 0 for an idle one.
        output: int64 [slots, positions], the tokens drawn.
        cos: [slots, positions, rotary_dim], by position in the cache.
        sin: as ``cos``.
        noise: fp32 [slots, NOISE_BLOCK, vision_vocab_size], used at step ``drawn % NOISE_BLOCK``.
        sampler: every slot's sampling.
        allowed: bool [2, vision_vocab_size]: in the preview, in the picture's grid.
        cache: keys and values.
    """

    tokens: Tensor
    lengths: Tensor
    drawn: Tensor
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
        """Makes the state of idle slots."""
        tokens, lengths, drawn, active = torch.zeros(4, slots, device=device, dtype=torch.int64)
        cos, sin = torch.zeros(2, slots, positions, config.rotary_dim, device=device, dtype=dtype)
        return cls(
            tokens=tokens,
            lengths=lengths,
            drawn=drawn,
            active=active,
            output=torch.zeros(slots, positions, device=device, dtype=torch.int64),
            cos=cos,
            sin=sin,
            noise=torch.ones(slots, NOISE_BLOCK, config.vision_vocab_size, device=device),
            sampler=SamplerRows.empty(slots, device),
            allowed=allowed_ids(config, device),
            cache=KvCache(config, slots, positions, device, dtype),
        )

    def set(self, slot: int, length: int, drawn: int, active: bool) -> None:
        """Sets where a slot is, once the steps under way are done; waits for none of them.

        Filled, since an assigned number is copied from the host, which waits for the device.
        """
        for tensor, value in ((self.lengths, length), (self.drawn, drawn), (self.active, int(active))):
            tensor[slot].fill_(value)

    def advance(self, rows: Tensor) -> None:
        """Notes the tokens just drawn and moves the active slots on; ``rows`` is int64 [slots], 0 and up."""
        self.output[rows, self.drawn] = self.tokens
        self.lengths.add_(self.active)
        self.drawn.add_(self.active)

"""Sampling of image tokens: temperature, top-k, top-p, and the exponential race of ``torch.multinomial``, row by row.

The arithmetic is that of transformers' logits warpers and of ``torch.multinomial``; the noise is generated in advance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm_image.ar.config import ArConfig
from glm_image.request.parameters import Sampling


@dataclass(frozen=True)
class SamplerRows:
    """The sampling parameters of every slot, on the device.

    Attributes:
        temperature: fp32 [slots, 1].
        cut: fp32 [slots, 1]: 1 - top_p.
        kth: int64 [slots, 1]: index of the k-th best logit in ascending order.
        preview_tokens: int64 [slots]: number of tokens before those of the image's own grid.
    """

    temperature: Tensor
    cut: Tensor
    kth: Tensor
    preview_tokens: Tensor

    @classmethod
    def empty(cls, slots: int, device: torch.device) -> SamplerRows:
        return cls(
            temperature=torch.ones(slots, 1, device=device),
            cut=torch.zeros(slots, 1, device=device),
            kth=torch.zeros(slots, 1, device=device, dtype=torch.int64),
            preview_tokens=torch.zeros(slots, device=device, dtype=torch.int64),
        )

    def set(self, slot: int, sampling: Sampling, preview_tokens: int, vocabulary: int) -> None:
        """Sets one slot's row, without waiting for the device as an assignment would."""
        self.temperature[slot].fill_(sampling.temperature)
        self.cut[slot].fill_(1 - sampling.top_p)
        self.kth[slot].fill_(vocabulary - min(sampling.top_k, vocabulary))
        self.preview_tokens[slot].fill_(preview_tokens)

    def row(self, slot: int) -> SamplerRows:
        return self._at(slice(slot, slot + 1))

    def rows(self, slots: Tensor) -> SamplerRows:
        """Returns copies of the rows of ``slots``, int64 [rows]."""
        return self._at(slots)

    def _at(self, slots: slice | Tensor) -> SamplerRows:
        return SamplerRows(self.temperature[slots], self.cut[slots], self.kth[slots], self.preview_tokens[slots])


def allowed_ids(config: ArConfig, device: torch.device) -> Tensor:
    """Returns the allowed ids, bool [2, vision_vocab_size]: row 0 in the preview, row 1 in the image's own grid.

    The reference stops at an end id, and fails on ids beyond the codebook in the image's own grid.
    """
    ids = torch.arange(config.vision_vocab_size, device=device)
    ends = torch.tensor(config.end_ids, device=device)
    return torch.stack([~torch.isin(ids, ends), ids < config.codebook_size])


def sample(logits: Tensor, noise: Tensor, rows: SamplerRows, allowed: Tensor) -> Tensor:
    """Samples one token per row, int64 [rows].

    Disallowed ids are excluded only at the end of the race, so that wherever the reference samples an allowed id, this
    samples the same one. Where top-k and top-p leave only disallowed ids, the best allowed id is taken.

    Args:
        logits: fp32 [rows, vocabulary].
        noise: fp32 [rows, vocabulary], exponentially distributed.
        rows: the rows' sampling parameters.
        allowed: bool [rows, vocabulary].
    """
    scores = logits / rows.temperature
    ascending, order = scores.sort(dim=-1)
    ascending = ascending.masked_fill(ascending < ascending.gather(1, rows.kth), -torch.inf)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= rows.cut
    dropped[:, -1] = False
    kept = ascending.masked_fill(dropped, -torch.inf)
    probabilities = torch.empty_like(scores).scatter_(1, order, kept).softmax(dim=-1)
    race = (probabilities / noise).masked_fill(~allowed, 0.0)
    # A race without a winner goes to the best allowed logit; scores below 0 keep it behind any real winner.
    behind = scores - scores.amax(dim=-1, keepdim=True) - 1.0
    return torch.where(race > 0, race, behind.masked_fill(~allowed, -torch.inf)).argmax(dim=-1)

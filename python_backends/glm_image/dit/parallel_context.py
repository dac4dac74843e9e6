"""How the ranks of an instance share a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glm_image.dit.conditioning import Conditioning, Rotary
from glm_image.dit.sequence_parallel import SequenceAttention, TokenSplit
from glm_image.parallel.process_group import ONE_RANK, Ranks


class ParallelContext:
    """How the ranks of an instance share a picture; made for one rank, it changes nothing.

    Args:
        ranks: this process's.
        attention: attends where the tokens are split.

    Attributes:
        ranks: as given.
    """

    def __init__(self, ranks: Ranks = ONE_RANK, attention: SequenceAttention | None = None) -> None:
        self.ranks = ranks
        self._attention = attention
        self._split = TokenSplit(ranks.ring, ranks.ulysses)

    def own_conditioning(self, whole: Conditioning) -> Conditioning:
        """Returns this rank's branches of a picture's conditions, and of those its tokens."""
        branches, sources = whole.branches, whole.sources
        if self.ranks.cfg.size == len(branches) > 1:
            branches = [branches[self.ranks.cfg.rank]]
            sources = sources if self.ranks.cfg.rank == 0 else None
        own = [replace(branch, prior=self.own(branch.prior, dim=1)) for branch in branches]
        return replace(whole, branches=own, rotary=self.own_rotary(whole.rotary), sources=sources)

    def own_rotary(self, rotary: Rotary) -> Rotary:
        """Returns the rotary tables of this rank's tokens."""
        cos, sin = (self.own(table, dim=0) for table in rotary)
        return cos, sin

    def own(self, tokens: Tensor, dim: int) -> Tensor:
        """Returns this rank's tokens of what all ranks have whole."""
        return self._split.own(tokens, dim)

    def whole(self, own: Tensor, count: int) -> Tensor:
        """Returns all ``count`` tokens, [1, count, ...], of which this rank has ``own``."""
        return self._split.whole(own[0], count)[None]

    def all_branches(self, own: list[Tensor], *, guided: bool) -> list[Tensor]:
        """Returns what every branch gave: the conditional one, and with guidance the unconditional one."""
        return self.ranks.cfg.all_gather(own[0]) if guided and len(own) == 1 else own

    def mean(self, means: Tensor, tokens: int) -> Tensor:
        """Returns means over all ranks' tokens of a branch, given those over this rank's ``tokens``."""
        if self._attention is None:
            return means
        sums = torch.cat([means * tokens, means.new_full((1,), tokens)])
        for group in (self.ranks.ulysses, self.ranks.ring):
            group.all_reduce_sum(sums)
        return sums[:-1] / sums[-1]

    def begin(self, tokens: int, joined: Sequence[int] = ()) -> None:
        """To be called before a forward; see ``SequenceAttention.begin``."""
        if self._attention is not None:
            self._attention.begin(tokens, joined)

    def begin_picture(self, conditioning: Conditioning) -> None:
        """To be called before blocks run over a picture's sequences."""
        sources = conditioning.sources
        self.begin(conditioning.tokens, sources.tokens if sources else ())


SINGLE_RANK = ParallelContext()

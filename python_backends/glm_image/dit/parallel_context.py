"""How the ranks of an instance share an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glm_image.dit.conditioning import Conditioning, Rotary
from glm_image.dit.sequence_parallel import SequenceShape, TokenSplit
from glm_image.parallel.process_group import ONE_RANK, Ranks


class ParallelContext:
    """How the ranks of an instance share an image; of one rank, it changes nothing.

    Args:
        ranks: this process's.

    Attributes:
        ranks: as given.
    """

    def __init__(self, ranks: Ranks = ONE_RANK) -> None:
        self.ranks = ranks
        self._split = TokenSplit(ranks.ring, ranks.ulysses)

    def shard_conditioning(self, conditioning: Conditioning) -> Conditioning:
        """Returns this rank's branches of an image's conditioning, and its tokens of those."""
        branches, sources = conditioning.branches, conditioning.sources
        if self.ranks.cfg.size == len(branches) > 1:
            branches = [branches[self.ranks.cfg.rank]]
            sources = sources if self.ranks.cfg.rank == 0 else None
        shards = [replace(branch, prior=self.shard(branch.prior, dim=1)) for branch in branches]
        rotary = self.shard_rotary(conditioning.rotary)
        return replace(conditioning, branches=shards, rotary=rotary, sources=sources)

    def shard_rotary(self, rotary: Rotary) -> Rotary:
        """Returns the rotary tables of this rank's tokens."""
        cos, sin = (self.shard(table, dim=0) for table in rotary)
        return cos, sin

    def shard(self, tokens: Tensor, dim: int) -> Tensor:
        """Returns this rank's tokens of those that all ranks have."""
        return self._split.shard(tokens, dim)

    def all_gather(self, shard: Tensor, count: int) -> Tensor:
        """Returns all ``count`` tokens, [1, count, ...], given this rank's."""
        return self._split.all_gather(shard[0], count)[None]

    def gather_branches(self, velocities: list[Tensor], *, guided: bool) -> list[Tensor]:
        """Returns the conditional branch's velocity, and with guidance the unconditional one's, given this rank's."""
        return self.ranks.cfg.all_gather(velocities[0]) if guided and len(velocities) == 1 else velocities

    def mean(self, means: Tensor, tokens: int) -> Tensor:
        """Returns means over all ranks' tokens of a branch, given those over this rank's ``tokens``."""
        if not self._split.is_split:
            return means
        sums = torch.cat([means * tokens, means.new_full((1,), tokens)])
        for group in (self.ranks.ulysses, self.ranks.ring):
            group.all_reduce_sum(sums)
        return sums[:-1] / sums[-1]

    def sequence_shape(self, tokens: int, source_tokens: Sequence[int] = ()) -> SequenceShape | None:
        """Returns what attention needs to know of a sequence whose tokens are split; None where they are not."""
        return SequenceShape(tokens, tuple(source_tokens)) if self._split.is_split else None


SINGLE_RANK = ParallelContext()

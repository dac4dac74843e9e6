"""The shards of a rank in a denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glm_image.dit.conditioning import Conditioning, Rotary
from glm_image.dit.sequence_parallel import SequenceShape
from glm_image.parallel.process_group import ONE_RANK, Ranks


class ParallelContext:
    """The branches and tokens of an image that a rank computes; of one rank, all of them."""

    def __init__(self, ranks: Ranks = ONE_RANK) -> None:
        self.ranks = ranks

    @property
    def splits_tokens(self) -> bool:
        return self.ranks.ring.size * self.ranks.ulysses.size > 1

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
        cos, sin = (self.shard(table, dim=0) for table in rotary)
        return cos, sin

    def shard(self, tokens: Tensor, dim: int) -> Tensor:
        """Returns this rank's tokens of those that all ranks have."""
        outer = self.ranks.ring.shard_range(tokens.shape[dim])
        inner = self.ranks.ulysses.shard_range(len(outer))
        return tokens.narrow(dim, outer.start + inner.start, len(inner))

    def all_gather(self, shard: Tensor, count: int) -> Tensor:
        """Returns all ``count`` tokens, [1, count, ...], given this rank's."""
        ring, ulysses = self.ranks.ring, self.ranks.ulysses
        of_ring = ulysses.all_gather_rows(shard[0], len(ring.shard_range(count)))
        return ring.all_gather_rows(of_ring, count)[None]

    def gather_branches(self, velocities: list[Tensor], *, guided: bool) -> list[Tensor]:
        """Returns the conditional branch's velocity, and with guidance the unconditional one's, given this rank's."""
        return self.ranks.cfg.all_gather(velocities[0]) if guided and len(velocities) == 1 else velocities

    def mean(self, means: Tensor, tokens: int) -> Tensor:
        """Returns means over all ranks' tokens of a branch, given those over this rank's ``tokens``."""
        if not self.splits_tokens:
            return means
        sums = torch.cat([means * tokens, means.new_full((1,), tokens)])
        for group in (self.ranks.ulysses, self.ranks.ring):
            group.all_reduce_sum(sums)
        return sums[:-1] / sums[-1]

    def sequence_shape(self, tokens: int, source_tokens: Sequence[int] = ()) -> SequenceShape | None:
        """Returns what attention needs to know of a sequence whose tokens are split; None where they are not."""
        return SequenceShape(tokens, tuple(source_tokens)) if self.splits_tokens else None


SINGLE_RANK = ParallelContext()

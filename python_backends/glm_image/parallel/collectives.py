"""Ranks that compute one thing together, and the few collectives the models use."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Torch 2.13's name for it, before which there was the other."""


class Transfer:
    """What ranks are sending each other, while the device does something else.

    Args:
        works: torch's handles.
        sent: kept until it has left.
    """

    def __init__(self, works: Sequence[Any], sent: Tensor) -> None:
        self._works: Sequence[Any] = works
        self._sent: Tensor | None = sent

    def wait(self) -> None:
        """Has what the device is told from now on wait until all of it is there."""
        for work in self._works:
            work.wait()
        self._works, self._sent = (), None


class Group:
    """Some ranks of an instance; every rank of a group must call the same collectives in the same order.

    Args:
        ranks: the instance's ranks that belong to it, in order.
        rank: this process's place among them.
        process_group: torch's; None for a group of one, whose collectives do nothing.
        uses_peer_memory: see the attribute.

    Attributes:
        rank: this process's place in the group.
        size: how many ranks it has.
        process_group: as given.
        uses_peer_memory: whether kernels may use the other ranks' memory, where the devices can.
    """

    def __init__(
        self, ranks: Sequence[int] = (0,), rank: int = 0, process_group: Any = None, *, uses_peer_memory: bool = True
    ) -> None:
        self.rank, self.size = rank, len(ranks)
        self._ranks = tuple(ranks)
        self.process_group = process_group
        self.uses_peer_memory = uses_peer_memory

    def without_peer_memory(self) -> Group:
        """Returns the same ranks, whose kernels leave each other's memory alone."""
        return Group(self._ranks, self.rank, self.process_group, uses_peer_memory=False)

    def shard_range(self, count: int) -> range:
        """Returns which of ``count`` things are this rank's: consecutive ones, as even as can be."""
        return self.shard_ranges(count)[self.rank]

    def shard_ranges(self, count: int) -> list[range]:
        """Returns every rank's share of ``count`` things."""
        edges = [count * rank // self.size for rank in range(self.size + 1)]
        return [range(start, end) for start, end in pairwise(edges)]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Adds the ranks' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns the tensor of every rank, all of one shape."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.process_group)
        return gathered

    def all_gather_into(self, gathered: Tensor, tensor: Tensor) -> None:
        """Writes the tensor of every rank to ``gathered``, one after the other along the first dimension."""
        _gather_single(gathered, tensor, self.process_group)

    def all_gather_async(self, gathered: Tensor, tensor: Tensor) -> Transfer:
        """Begins ``gather_into``."""
        return Transfer([_gather_single(gathered, tensor, self.process_group, async_op=True)], tensor)

    def all_gather_rows(self, tensor: Tensor, count: int) -> Tensor:
        """Puts the ranks' shares of ``count`` rows one after the other; ``tensor`` is [rows of this share, ...]."""
        if self.size == 1:
            return tensor
        sizes = [len(share) for share in self.shard_ranges(count)]
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return torch.cat([part[:size] for part, size in zip(self.all_gather(padded), sizes, strict=True)])

    def all_to_all_async(
        self, sent: Tensor, sent_rows: Sequence[int], received: Tensor, received_rows: Sequence[int]
    ) -> Transfer:
        """Begins to give every rank some rows of ``sent``, and to write what each gives this one to ``received``.

        Args:
            sent: contiguous, [sum of ``sent_rows``, ...].
            sent_rows: how many are each rank's, in their order.
            received: contiguous, [sum of ``received_rows``, ...].
            received_rows: how many come from each rank.
        """
        rows = list(received_rows), list(sent_rows)
        return Transfer([dist.all_to_all_single(received, sent, *rows, self.process_group, async_op=True)], sent)

    def send_recv_async(self, tensor: Tensor, received: Tensor) -> Transfer:
        """Begins to give ``tensor`` to the next rank of the ring, and to write what the one before gives."""
        following, before = ((self.rank + offset) % self.size for offset in (1, -1))
        transfers = [
            dist.P2POp(dist.isend, tensor, self._ranks[following], self.process_group),
            dist.P2POp(dist.irecv, received, self._ranks[before], self.process_group),
        ]
        return Transfer(dist.batch_isend_irecv(transfers), tensor)

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        """Returns the smallest of the ranks' values, so that all decide alike; waits for the device."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self.process_group)
        return int(shared.item())


ALONE = Group()
"""The group of an instance that has one device."""

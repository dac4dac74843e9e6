"""A group of ranks and the collectives that the models use, named as in ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Torch 2.13 renames ``all_gather_into_tensor``."""


class Transfer:
    """Communication that overlaps with computation."""

    def __init__(self, works: Sequence[Any], sent: Tensor) -> None:
        self._works: Sequence[Any] = works
        self._sent: Tensor | None = sent  # kept alive until the transfer ends

    def wait(self) -> None:
        """Makes the device's later work wait for the transfer; see ``torch.distributed.Work.wait``."""
        for work in self._works:
            work.wait()
        self._works, self._sent = (), None


class Group:
    """Some ranks of an instance; all ranks of a group must call the same collectives in the same order.

    Args:
        ranks: the members, as ranks of the instance, in order.
        rank: this process's index in ``ranks``.
        process_group: torch's; None for a group of one, whose collectives do nothing.
        uses_peer_memory: whether kernels may access the other ranks' memory, where the devices can.
    """

    def __init__(
        self, ranks: Sequence[int] = (0,), rank: int = 0, process_group: Any = None, *, uses_peer_memory: bool = True
    ) -> None:
        self.rank, self.size = rank, len(ranks)
        self._ranks = tuple(ranks)
        self.process_group = process_group
        self.uses_peer_memory = uses_peer_memory

    def without_peer_memory(self) -> Group:
        return Group(self._ranks, self.rank, self.process_group, uses_peer_memory=False)

    def shard_range(self, count: int) -> range:
        """Returns this rank's shard of ``count`` rows: contiguous, and as even as possible."""
        return self.shard_ranges(count)[self.rank]

    def shard_ranges(self, count: int) -> list[range]:
        edges = [count * rank // self.size for rank in range(self.size + 1)]
        return [range(start, end) for start, end in pairwise(edges)]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sums the ranks' tensors in place and returns the sum."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        """Returns the smallest of the ranks' values; waits for the device."""
        if self.size == 1:
            return value
        reduced = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(reduced, dist.ReduceOp.MIN, group=self.process_group)
        return int(reduced.item())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns the tensors of all ranks, which have one shape."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.process_group)
        return gathered

    def all_gather_into(self, gathered: Tensor, tensor: Tensor) -> None:
        """Writes the tensors of all ranks to ``gathered`` [size * rows, ...]; ``tensor`` is [rows, ...]."""
        _all_gather_single(gathered, tensor, self.process_group)

    def all_gather_async(self, gathered: Tensor, tensor: Tensor) -> Transfer:
        return Transfer([_all_gather_single(gathered, tensor, self.process_group, async_op=True)], tensor)

    def all_gather_rows(self, tensor: Tensor, count: int) -> Tensor:
        """Concatenates the ranks' shards of ``count`` rows, even or not; ``tensor`` is [rows of the shard, ...]."""
        if self.size == 1:
            return tensor
        sizes = [len(shard) for shard in self.shard_ranges(count)]
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return torch.cat([part[:size] for part, size in zip(self.all_gather(padded), sizes, strict=True)])

    def all_to_all_async(
        self, sent: Tensor, sent_rows: Sequence[int], received: Tensor, received_rows: Sequence[int]
    ) -> Transfer:
        """Starts to send every rank its rows of ``sent``, and to write the rows that each sends to ``received``.

        Both tensors are contiguous, [sum of their rows, ...], in the order of the ranks.
        """
        rows = list(received_rows), list(sent_rows)
        return Transfer([dist.all_to_all_single(received, sent, *rows, self.process_group, async_op=True)], sent)

    def send_recv_async(self, tensor: Tensor, received: Tensor) -> Transfer:
        """Starts to send ``tensor`` to the next rank of the ring, and to write the previous rank's to ``received``."""
        following, previous = ((self.rank + offset) % self.size for offset in (1, -1))
        transfers = [
            dist.P2POp(dist.isend, tensor, self._ranks[following], self.process_group),
            dist.P2POp(dist.irecv, received, self._ranks[previous], self.process_group),
        ]
        return Transfer(dist.batch_isend_irecv(transfers), tensor)


ALONE = Group()
"""The group of an instance that has one device."""

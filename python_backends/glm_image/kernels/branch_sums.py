"""How a branch of the decoder ends: the parts of its last linear are summed, over one rank or over several.

Ranks add the same numbers up in the same order, so that all of them have the same bits: all parts where they are
gathered, else the sum of each rank's parts.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous
from glm_image.kernels.residual_norm import end_branch, residual_norm, sum_of_parts
from glm_image.kernels.split_rows import SplitRows, destination
from glm_image.parallel.collectives import Group

logger = logging.getLogger(__name__)

TURNS = tl.constexpr(3)
"""Inboxes that are used in turn."""
EMPTY = tl.constexpr(-(2**31))
"""The bits of -0.0."""


class BranchSum(Protocol):
    """Where a branch's last linear writes, and what is made of it.

    Attributes:
        parts: fp32 [splits, rows, width].
    """

    parts: Tensor

    def add(self, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | SplitRows, eps: float) -> None:
        """Sums the parts and ends the branch; see ``residual_norm``."""


class OwnSum:
    """The sum of one rank's parts."""

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    def add(self, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | SplitRows, eps: float) -> None:
        """See ``BranchSum``."""
        residual_norm(self.parts, residual, after, before, out, eps)


class GatheredSum:
    """The sum of all ranks' parts, gathered by the library of collectives."""

    def __init__(self, parts: Tensor, group: Group) -> None:
        self.parts, self._group = parts, group
        self._everyones = parts.new_empty(group.size * parts.shape[0], *parts.shape[1:])

    def add(self, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | SplitRows, eps: float) -> None:
        """See ``BranchSum``."""
        self._group.all_gather_into(self._everyones, self.parts)
        residual_norm(self._everyones, residual, after, before, out, eps)


class PeerSum:
    """The sum of all ranks' parts, which each adds up and writes into the others' memory: no launch of its own.

    What has arrived tells so by itself: an inbox is full of -0.0, which nothing is that was added to 0.0, and a reader
    waits until no -0.0 is left. So an exchange costs one way from memory to memory (TensorRT-LLM's all-reduce for few
    rows does the same). Three inboxes take turns: a rank reads one and empties the one that it read before, while
    another that is ahead by a sum, which is as far as it gets, writes to the third.

    Args:
        parts: fp32 [splits, rows, width], the buffer of this rank.
        inboxes: addresses of the ranks' inboxes, int64 [ranks]; each fp32 [``TURNS``, ranks, rows, width] and empty.
        rank: this one.
        kept: what the inboxes belong to.
    """

    def __init__(self, parts: Tensor, inboxes: Tensor, rank: int, kept: object = None) -> None:
        self.parts, self._inboxes, self._rank, self._kept = parts, inboxes, rank, kept
        self._turns = torch.zeros(parts.shape[1], dtype=torch.int32, device=parts.device)

    @classmethod
    def between(cls, parts: Tensor, group: Group) -> PeerSum:
        """Makes a sum over ranks; all of them must call this.

        Args:
            parts: fp32 [splits, rows, width], the buffer of this rank.
            group: the ranks.

        Raises:
            RuntimeError: their devices can't write each other's memory.
        """
        from torch.distributed import _symmetric_memory as symmetric  # noqa: PLC0415 - on CUDA alone

        device, shape = parts.device, inbox_shape(parts, group.size)
        inbox = symmetric.empty(shape, dtype=parts.dtype, device=device).fill_(-0.0)
        handle = symmetric.rendezvous(inbox, group.process_group)
        everyones = [handle.get_buffer(rank, shape, inbox.dtype) for rank in range(group.size)]
        addresses = torch.tensor([one.data_ptr() for one in everyones], device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group.process_group)  # every inbox is empty before anything is sent
        return cls(parts, addresses, group.rank, kept=(inbox, handle, everyones))

    def add(self, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | SplitRows, eps: float) -> None:
        """See ``BranchSum``."""
        splits, rows, width = self.parts.shape
        place, scale, split = destination(out)
        _peer_sum_kernel[(rows,)](
            self.parts, self._inboxes, self._turns, residual, after, before, place, scale, rows, width, eps,
            self._rank, len(self._inboxes), splits, split,
            triton.next_power_of_2(width), can_overlap(), num_warps=16, launch_pdl=can_overlap(),
        )  # fmt: skip


def inbox_shape(parts: Tensor, ranks: int) -> tuple[int, ...]:
    """The shape of an inbox for parts [splits, rows, width]."""
    return TURNS.value, ranks, *parts.shape[1:]


@triton.jit
def _peer_sum_kernel(
    parts_ptr, inboxes_ptr, turns_ptr, residual_ptr, after_ptr, before_ptr, out_ptr, scale_ptr, rows, width, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < width
    after = tl.load(after_ptr + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(before_ptr + at, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    turn = tl.load(turns_ptr + row)
    own = sum_of_parts(parts_ptr, rows, row, width, at, inside, SPLITS)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.store(_inbox(inboxes_ptr, rank, turn, RANK, RANKS, rows, row, width) + at, own, mask=inside)
    residual = tl.load(residual_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            sums += own
        else:
            sums += _received(_inbox(inboxes_ptr, RANK, turn, rank, RANKS, rows, row, width) + at, inside)
    emptied = (turn + TURNS - 1) % TURNS
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            inbox = _inbox(inboxes_ptr, RANK, emptied, rank, RANKS, rows, row, width) + at
            tl.store(inbox.to(tl.pointer_type(tl.int32)), tl.full([BLOCK], EMPTY, tl.int32), mask=inside)
    tl.store(turns_ptr + row, (turn + 1) % TURNS)  # here, where all threads have read it: they waited together
    end_branch(sums, residual, after, before, residual_ptr, out_ptr, scale_ptr, row, at, inside, width, eps, SPLIT)


@triton.jit
def _inbox(inboxes_ptr, owner, turn, sender, RANKS: tl.constexpr, rows, row, width):
    # Where a rank has a row of what another sends.
    inbox = tl.load(inboxes_ptr + owner).to(tl.pointer_type(tl.float32))
    inbox = tl.multiple_of(inbox, 16)  # so that whole vectors are written
    return inbox + ((turn * RANKS + sender) * rows + row) * width


@triton.jit
def _received(pointers, inside):
    pointers = pointers.to(tl.pointer_type(tl.int32))
    values = tl.load(pointers, mask=inside, other=0, volatile=True)
    while tl.max((values == EMPTY).to(tl.int32), axis=0) > 0:
        values = tl.load(pointers, mask=inside, other=0, volatile=True)
    return values.to(tl.float32, bitcast=True)


def branch_sum(parts: Tensor, group: Group) -> BranchSum:
    """Returns the fastest sum there is over the ranks of a group.

    Args:
        parts: fp32 [splits, rows, width], the buffer of one rank.
        group: the ranks.
    """
    if group.size == 1:
        return OwnSum(parts)
    if group.uses_peer_memory:
        try:
            return PeerSum.between(parts, group)
        except (ImportError, AttributeError, RuntimeError) as error:
            logger.warning("the ranks' devices can't write each other's memory, so parts are gathered: %s", error)
    return GatheredSum(parts, group)

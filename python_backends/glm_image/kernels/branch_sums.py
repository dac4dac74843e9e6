"""How a branch of the decoder ends: the parts of its last linear are summed, over one rank or over several.

Ranks sum the same parts in the same order, so that all of them have the same bits.
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
from glm_image.kernels.residual_norm import end_branch, residual_norm
from glm_image.kernels.split_rows import SplitRows, destination
from glm_image.parallel.group import Group

logger = logging.getLogger(__name__)


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
        self._group.gather_into(self._everyones, self.parts)
        residual_norm(self._everyones, residual, after, before, out, eps)


class PeerSum:
    """The sum of all ranks' parts, which each writes into the others' memory: no collective, no launch of its own.

    A row's parts are followed by a count, one more each time, for which the reader waits. One inbox is not enough: a
    rank may write the next parts as soon as it has read these, while another still reads. With two, used in turn, the
    count of the one tells that the other has been read.

    Args:
        parts: fp32 [splits, rows, width], the buffer of this rank.
        group: the ranks; their devices can write each other's memory.

    Raises:
        RuntimeError: they can't.
    """

    def __init__(self, parts: Tensor, group: Group) -> None:
        from torch.distributed import _symmetric_memory as symmetric  # noqa: PLC0415 - on CUDA alone

        rows, device = parts.shape[1], parts.device
        self.parts, self._group = parts, group
        self._inbox = symmetric.empty((group.size, *parts.shape), dtype=parts.dtype, device=device)
        self._told = symmetric.empty((group.size, rows), dtype=torch.int32, device=device).zero_()
        self._counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self._inboxes, self._all_told = (
            torch.tensor(
                [
                    handle.get_buffer(rank, tensor.shape, tensor.dtype).data_ptr()
                    for handle in [symmetric.rendezvous(tensor, group.process_group)]
                    for rank in range(group.size)
                ],
                dtype=torch.int64,
                device=device,
            )
            for tensor in (self._inbox, self._told)
        )
        torch.cuda.synchronize(device)
        dist.barrier(group.process_group)

    def add(self, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | SplitRows, eps: float) -> None:
        """See ``BranchSum``."""
        splits, rows, width = self.parts.shape
        place, scale, split = destination(out)
        _peer_sum_kernel[(rows,)](
            self.parts, self._inboxes, self._inbox, self._all_told, self._told, self._counts, residual, after, before,
            place, scale, rows, width, eps, self._group.rank, self._group.size, splits, split,
            triton.next_power_of_2(width), can_overlap(), num_warps=16, launch_pdl=can_overlap(),
        )  # fmt: skip


@triton.jit
def _peer_sum_kernel(
    parts_ptr, inboxes_ptr, inbox_ptr, all_told_ptr, told_ptr, counts_ptr, residual_ptr, after_ptr, before_ptr, out_ptr,
    scale_ptr, rows, width, eps, RANK: tl.constexpr, RANKS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < width
    after = tl.load(after_ptr + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(before_ptr + at, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    count = tl.load(counts_ptr + row) + 1
    for split in tl.static_range(SPLITS):
        part = (split * rows + row) * width + at
        values = tl.load(parts_ptr + part, mask=inside, other=0.0)
        for rank in tl.static_range(RANKS):
            if rank != RANK:
                inbox = tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.float32))
                inbox = tl.multiple_of(inbox, 16)  # so that whole vectors are written
                tl.store(inbox + RANK * SPLITS * rows * width + part, values, mask=inside)
    tl.debug_barrier()  # all of the row is written before one thread tells so
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            told = tl.load(all_told_ptr + rank).to(tl.pointer_type(tl.int32)) + RANK * rows + row
            tl.atomic_xchg(told, count, sem="release", scope="sys")
    residual = tl.load(residual_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            # As a difference, since counts begin anew below zero after some days of decoding.
            while tl.atomic_add(told_ptr + rank * rows + row, 0, sem="acquire", scope="sys") - count < 0:
                pass
    tl.store(counts_ptr + row, count)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        for split in tl.static_range(SPLITS):
            part = (split * rows + row) * width + at
            if rank == RANK:
                sums += tl.load(parts_ptr + part, mask=inside, other=0.0)
            else:
                theirs = inbox_ptr + rank * SPLITS * rows * width + part
                sums += tl.load(theirs, mask=inside, other=0.0, volatile=True)
    end_branch(sums, residual, after, before, residual_ptr, out_ptr, scale_ptr, row, at, inside, width, eps, SPLIT)


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
            return PeerSum(parts, group)
        except (ImportError, AttributeError, RuntimeError) as error:
            logger.warning("the ranks' devices can't write each other's memory, so parts are gathered: %s", error)
    return GatheredSum(parts, group)

"""The end of a branch of the decoder: the partial sums of its last linear are added, over one rank or over several.

Ranks add the same numbers in the same order, so that all of them have the same bits: all partial sums where they are
gathered, otherwise the sum of each rank's partial sums.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.int8_pairs import Int8Pairs, store_arguments
from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous
from glm_image.kernels.residual_norm import end_branch, residual_norm, sum_of_partials
from glm_image.parallel.collectives import Group

logger = logging.getLogger(__name__)

INBOXES = tl.constexpr(3)
"""Inboxes of a rank, used in rotation."""
EMPTY = tl.constexpr(-(2**31))
"""The bits of -0.0."""


class BranchSum:
    """Adds the partial sums of a branch's last linear, fp32 [split_k, rows, width], over one rank and ends the branch.

    Attributes:
        partials: written by the linear.
    """

    def __init__(self, partials: Tensor) -> None:
        self.partials = partials

    def add(self, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | Int8Pairs, eps: float) -> None:
        """Ends the branch; see ``residual_norm``."""
        residual_norm(self.partials, residual, after, before, out, eps)


class GatheredSum(BranchSum):
    """The sum over all ranks, whose partial sums the collectives' library gathers."""

    def __init__(self, partials: Tensor, group: Group) -> None:
        super().__init__(partials)
        self._group = group
        self._gathered = partials.new_empty(group.size * partials.shape[0], *partials.shape[1:])

    def add(self, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | Int8Pairs, eps: float) -> None:
        self._group.all_gather_into(self._gathered, self.partials)
        residual_norm(self._gathered, residual, after, before, out, eps)


class PeerSum(BranchSum):
    """The sum over all ranks, each of which writes its own sum into the others' memory: without an extra launch.

    Arrived data marks itself: an empty inbox is full of -0.0, which no sum that starts at 0.0 can be, and a reader
    waits until no -0.0 is left. So an exchange costs one way from memory to memory (TensorRT-LLM's all-reduce for few
    rows works alike). Three inboxes rotate: a rank reads one and empties the one that it read before, while another
    rank, which can be ahead by one sum at most, writes to the third.

    Args:
        inboxes: addresses of the ranks' inboxes, int64 [ranks]; each fp32 [``INBOXES``, ranks, rows, width] and empty.
    """

    def __init__(self, partials: Tensor, inboxes: Tensor, rank: int, memory: object = None) -> None:
        super().__init__(partials)
        self._inboxes, self._rank, self._memory = inboxes, rank, memory
        self._turns = torch.zeros(partials.shape[1], dtype=torch.int32, device=partials.device)

    @classmethod
    def between(cls, partials: Tensor, group: Group) -> PeerSum:
        """Returns a sum over the ranks of a group, all of which must call this.

        Raises:
            RuntimeError: their devices can't write each other's memory.
        """
        from torch.distributed import _symmetric_memory as symmetric  # noqa: PLC0415 - on CUDA alone

        device, shape = partials.device, inbox_shape(partials, group.size)
        inbox = symmetric.empty(shape, dtype=partials.dtype, device=device).fill_(-0.0)
        handle = symmetric.rendezvous(inbox, group.process_group)
        inboxes = [handle.get_buffer(rank, shape, inbox.dtype) for rank in range(group.size)]
        addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes], device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group.process_group)  # every inbox is empty before anything is sent
        return cls(partials, addresses, group.rank, memory=(inbox, handle, inboxes))

    def add(self, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | Int8Pairs, eps: float) -> None:
        split_k, rows, width = self.partials.shape
        values, scale, int8_pair = store_arguments(out)
        _peer_sum_kernel[(rows,)](
            self.partials, self._inboxes, self._turns, residual, after, before, values, scale, rows, width, eps,
            self._rank, len(self._inboxes), split_k, int8_pair,
            triton.next_power_of_2(width), can_overlap(), num_warps=16, launch_pdl=can_overlap(),
        )  # fmt: skip


def inbox_shape(partials: Tensor, ranks: int) -> tuple[int, ...]:
    """Returns the shape of an inbox for partial sums [split_k, rows, width]."""
    return INBOXES.value, ranks, *partials.shape[1:]


@triton.jit
def _peer_sum_kernel(
    partials_ptr, inboxes_ptr, turns_ptr, residual_ptr, after_ptr, before_ptr, out_ptr, scale_ptr, rows, width, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, SPLIT_K: tl.constexpr, INT8_PAIR: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    after = tl.load(after_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(before_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    turn = tl.load(turns_ptr + row)
    own = sum_of_partials(partials_ptr, rows, row, width, cols, mask, SPLIT_K)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.store(_inbox(inboxes_ptr, rank, turn, RANK, RANKS, rows, row, width) + cols, own, mask=mask)
    residual = tl.load(residual_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            sums += own
        else:
            sums += _receive(_inbox(inboxes_ptr, RANK, turn, rank, RANKS, rows, row, width) + cols, mask)
    emptied = (turn + INBOXES - 1) % INBOXES
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            inbox = _inbox(inboxes_ptr, RANK, emptied, rank, RANKS, rows, row, width) + cols
            tl.store(inbox.to(tl.pointer_type(tl.int32)), tl.full([BLOCK], EMPTY, tl.int32), mask=mask)
    tl.store(turns_ptr + row, (turn + 1) % INBOXES)  # here, where all threads have read it: they waited together
    end_branch(sums, residual, after, before, residual_ptr, out_ptr, scale_ptr, row, cols, mask, width, eps, INT8_PAIR)


@triton.jit
def _inbox(inboxes_ptr, owner, turn, sender, RANKS: tl.constexpr, rows, row, width):
    """Returns the address at which a rank receives a row of another."""
    inbox = tl.load(inboxes_ptr + owner).to(tl.pointer_type(tl.float32))
    inbox = tl.multiple_of(inbox, 16)  # so that whole vectors are written
    return inbox + ((turn * RANKS + sender) * rows + row) * width


@triton.jit
def _receive(pointers, mask):
    pointers = pointers.to(tl.pointer_type(tl.int32))
    values = tl.load(pointers, mask=mask, other=0, volatile=True)
    while tl.max((values == EMPTY).to(tl.int32), axis=0) > 0:
        values = tl.load(pointers, mask=mask, other=0, volatile=True)
    return values.to(tl.float32, bitcast=True)


def branch_sum(partials: Tensor, group: Group) -> BranchSum:
    """Returns the fastest sum over the ranks of a group, of partial sums fp32 [split_k, rows, width]."""
    if group.size == 1:
        return BranchSum(partials)
    if group.uses_peer_memory:
        try:
            return PeerSum.between(partials, group)
        except (ImportError, AttributeError, RuntimeError) as error:
            logger.warning("the ranks' devices can't write each other's memory, so sums are gathered: %s", error)
    return GatheredSum(partials, group)

"""Jacobi decoding on the device: guesses, rows and acceptance (Song et al., 2021).

A token is a fixed function of the tokens before it, of the sampling parameters and of the noise of its index. So the
next tokens can be guessed, all of them be computed in one step, and those guesses be kept that the function returns
for them: the accepted tokens are those of one-by-one decoding.

Row r of a step feeds slot ``slot[r]`` the token of index ``sampled[slot] - 1 + offset[r]`` and samples the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from glm_image.ar.state import DecodeState


@dataclass(frozen=True)
class Window:
    """What Jacobi decoding adds to ``DecodeState``; all at fixed addresses.

    Of the tensors of ``DecodeState``, ``output`` has at ``i < sampled`` the tokens, at ``sampled <= i < known`` what
    the last step sampled after a wrong guess, and at ``known <= i`` a first guess or anything. ``tokens`` and
    ``active`` are not used.

    Attributes:
        slot: int64 [capacity], the slot of a row; written by the host before a step.
        offset: int64 [capacity], the row's place in its slot's window; ``positions`` for a row of no slot, which comes
            after all others. Rows are ordered by slot, and by offset within a slot; offsets have no gaps.
        total: int64 [slots], tokens to sample in a slot; 0 for an idle one.
        known: int64 [slots], the number of entries of ``output`` that steps have written.
        guess_from: int64 [slots, positions], the index whose token is the first guess; its own where ``output`` was
            given the guess at admission.
    """

    slot: Tensor
    offset: Tensor
    total: Tensor
    known: Tensor
    guess_from: Tensor

    @classmethod
    def idle(cls, slots: int, positions: int, capacity: int, device: torch.device) -> Window:
        total, known = torch.zeros(2, slots, device=device, dtype=torch.int64)
        return cls(
            slot=torch.zeros(capacity, device=device, dtype=torch.int64),
            offset=torch.full((capacity,), positions, device=device, dtype=torch.int64),
            total=total,
            known=known,
            guess_from=torch.zeros(slots, positions, device=device, dtype=torch.int64),
        )


@dataclass(frozen=True)
class Rows:
    """The rows of one step, [rows] each.

    Attributes:
        slot: int64.
        offset: int64.
        index: int64, of the token that the row feeds; that which it samples is ``index + 1``. 0 where not ``valid``.
        position: int64, of the token in the cache; where not ``valid``, the last one, which no row reads.
        valid: bool, whether the sampled token belongs to the slot's sequence.
        token: int64, what the row feeds: a token of the sequence at offset 0, else a guess.
    """

    slot: Tensor
    offset: Tensor
    index: Tensor
    position: Tensor
    valid: Tensor
    token: Tensor

    def blocks(self, size: int) -> list[Rows]:
        """Divides the rows, a multiple of ``size``, in their order."""
        parts = (getattr(self, field.name).split(size) for field in fields(self))
        return [Rows(*block) for block in zip(*parts, strict=True)]


def window_rows(state: DecodeState, window: Window, rows: int) -> Rows:
    """Returns what the first ``rows`` rows feed."""
    slot, offset = window.slot[:rows], window.offset[:rows]
    sampled, known = state.sampled[slot], window.known[slot]
    last = state.output.shape[1] - 1
    index = sampled - 1 + offset
    valid = (index + 1 < window.total[slot]) & (index >= 0)
    index = torch.where(valid, index, 0)
    position = torch.where(valid, state.lengths[slot] + offset, last)
    source = window.guess_from[slot, index]
    source = torch.where((source < known) | (source == index), source, known - 1).clamp(min=0)
    source = torch.where(index < known, index, source)
    return Rows(slot, offset, index, position, valid, state.output[slot, source])


def accept(state: DecodeState, window: Window, rows: Rows, drawn: Tensor) -> None:
    """Stores the tokens ``drawn``, int64 [rows], and advances every slot by those that prove right.

    A slot's first row feeds a token of the sequence, so what it draws is right. What any other row draws is right if
    the row before it draws right, and draws the token that this row was fed.
    """
    slots, last = window.total.shape[0], state.output.shape[1] - 1
    before = torch.roll(drawn, 1)
    wrong = rows.valid & (rows.offset > 0) & (rows.token != before)
    # The first wrong row of a slot and all after it: their offsets are at least the least wrong offset.
    no_row = torch.full((slots,), last + 1, device=drawn.device, dtype=torch.int64)
    first_wrong = no_row.scatter_reduce(0, rows.slot, torch.where(wrong, rows.offset, last + 1), "amin")
    written = torch.zeros_like(no_row).scatter_add(0, rows.slot, rows.valid.long())
    accepted = torch.minimum(first_wrong, written)
    # What a row without a sequence draws goes to the last entry, which no token takes.
    state.output[rows.slot, torch.where(rows.valid, rows.index + 1, last)] = drawn
    window.known.copy_(torch.where(written > 0, state.sampled + written, window.known))
    state.counters.add_(accepted)


def write_layout(slot: Tensor, offset: Tensor, widths: Mapping[int, int], positions: int) -> None:
    """Writes ``Window.slot`` and ``Window.offset`` for a step in which slots have windows of ``widths``."""
    slot.zero_()
    offset.fill_(positions)
    row = 0
    for index, width in sorted(widths.items()):
        slot[row : row + width] = index
        offset[row : row + width] = torch.arange(width)
        row += width


def round_up(rows: int, block: int) -> int:
    """Returns the least multiple of ``block`` that is at least ``rows``."""
    return -(-rows // block) * block

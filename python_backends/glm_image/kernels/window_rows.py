"""The ends of a speculative step: what each row feeds, and which of the sampled tokens prove right.

The references are ``ar.window.window_rows`` and ``ar.window.accept``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.int8_pairs import Int8Pairs, store_arguments
from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous
from glm_image.kernels.residual_norm import store_embedding


@dataclass(frozen=True)
class WindowRows:
    """The rows of a step, int64 [rows] each.

    Attributes:
        slots: the slots of the rows, in ascending order but for unused rows at the end.
        offsets: the rows' places in their slots' windows, from 0 up without gaps.
        indices: of the tokens that the rows feed; -1 for an unused row.
        positions: of these tokens in the cache; -1 for an unused row.
        tokens: what the rows feed: a token of the sequence at offset 0, else a guess.
        drawn: the tokens that the rows sample.
    """

    slots: Tensor
    offsets: Tensor
    indices: Tensor
    positions: Tensor
    tokens: Tensor
    drawn: Tensor

    @classmethod
    def of(cls, slots: Tensor, offsets: Tensor) -> WindowRows:
        """Allocates what the kernels write."""
        indices, positions, tokens, drawn = torch.zeros(4, len(slots), device=slots.device, dtype=torch.int64)
        return cls(slots, offsets, indices, positions, tokens, drawn)


@dataclass(frozen=True)
class WindowSlots:
    """How far each slot is.

    Attributes:
        sampled: int64 [slots], tokens of the sequence so far.
        lengths: int64 [slots]: the position of the last of them, which a row feeds next.
        total: int64 [slots], tokens that the sequence will have; 0 for an idle slot.
        known: int64 [slots], entries of ``output`` that steps have written.
        guess_from: int64 [slots, positions], the index whose token is the first guess for an index.
        output: int64 [slots, positions], tokens of the sequences, then guesses.
    """

    sampled: Tensor
    lengths: Tensor
    total: Tensor
    known: Tensor
    guess_from: Tensor
    output: Tensor


@triton.jit
def _embed_window_kernel(
    slots_ptr, offsets_ptr, indices_ptr, positions_ptr, tokens_ptr,
    sampled_ptr, lengths_ptr, total_ptr, known_ptr, guess_from_ptr, output_ptr, positions,
    table_ptr, weight_ptr, residual_ptr, out_ptr, scale_ptr, width, eps,
    INT8_PAIR: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0)
    slot, offset = tl.load(slots_ptr + row), tl.load(offsets_ptr + row)
    index = tl.load(sampled_ptr + slot) - 1 + offset
    valid = (index >= 0) & (index + 1 < tl.load(total_ptr + slot))
    known = tl.load(known_ptr + slot)
    source = tl.load(guess_from_ptr + slot * positions + index, mask=valid, other=0)
    source = tl.where((source < known) | (source == index), source, known - 1)
    source = tl.maximum(tl.where(index < known, index, source), 0)
    token = tl.load(output_ptr + slot * positions + source, mask=valid, other=0)
    tl.store(indices_ptr + row, tl.where(valid, index, -1))
    tl.store(positions_ptr + row, tl.where(valid, tl.load(lengths_ptr + slot) + offset, -1))
    tl.store(tokens_ptr + row, token)
    store_embedding(token, table_ptr, weight_ptr, residual_ptr, out_ptr, scale_ptr, row, width, eps, INT8_PAIR, BLOCK)


def embed_window(
    rows: WindowRows, slots: WindowSlots, table: Tensor, weight: Tensor, residual: Tensor, out: Tensor | Int8Pairs,
    eps: float,
) -> None:  # fmt: skip
    """Chooses what the rows feed; writes their embeddings to ``residual`` and their norm to ``out``.

    ``table`` is bf16 [vocabulary, width]; ``residual`` is bf16 and ``out`` bf16 or int8 pairs, [rows, width].
    """
    count, width = residual.shape
    values, scale, int8_pair = store_arguments(out)
    _embed_window_kernel[(count,)](
        rows.slots, rows.offsets, rows.indices, rows.positions, rows.tokens,
        slots.sampled, slots.lengths, slots.total, slots.known, slots.guess_from, slots.output, slots.output.shape[1],
        table, weight, residual, values, scale, width, eps,
        int8_pair, triton.next_power_of_2(width), can_overlap(), num_warps=8, launch_pdl=can_overlap(),
    )  # fmt: skip


@triton.jit
def _accept_kernel(
    slots_ptr, offsets_ptr, indices_ptr, tokens_ptr, drawn_ptr, sampled_ptr, lengths_ptr, known_ptr, output_ptr,
    rows, positions, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    slot = tl.program_id(0)
    row = tl.arange(0, ROWS)
    in_rows = row < rows
    index = tl.load(indices_ptr + row, mask=in_rows, other=-1)
    offset = tl.load(offsets_ptr + row, mask=in_rows, other=0)
    valid = (tl.load(slots_ptr + row, mask=in_rows, other=-1) == slot) & (index >= 0)
    drawn = tl.load(drawn_ptr + row, mask=valid, other=0)
    # A slot's first row feeds a token of the sequence; another row is right if the row before it draws what it feeds.
    guessed = valid & (offset > 0)
    wrong = guessed & (tl.load(tokens_ptr + row, mask=guessed, other=0) != tl.load(
        drawn_ptr + row - 1, mask=guessed, other=0
    ))  # fmt: skip
    written = tl.sum(valid.to(tl.int64))
    accepted = tl.minimum(tl.min(tl.where(wrong, offset, positions)), written)
    tl.store(output_ptr + slot * positions + index + 1, drawn, mask=valid)
    sampled = tl.load(sampled_ptr + slot)
    if written > 0:
        tl.store(known_ptr + slot, sampled + written)
        tl.store(sampled_ptr + slot, sampled + accepted)
        tl.store(lengths_ptr + slot, tl.load(lengths_ptr + slot) + accepted)


def accept_window(rows: WindowRows, slots: WindowSlots) -> None:
    """Stores the tokens that the rows drew, and advances every slot by those that prove right."""
    count, positions = len(rows.slots), slots.output.shape[1]
    _accept_kernel[(len(slots.sampled),)](
        rows.slots, rows.offsets, rows.indices, rows.tokens, rows.drawn, slots.sampled, slots.lengths, slots.known,
        slots.output, count, positions, triton.next_power_of_2(count), can_overlap(),
        num_warps=4, launch_pdl=can_overlap(),
    )  # fmt: skip

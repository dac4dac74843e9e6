"""Sampling of one token per row without sorting the vocabulary.

The cut-offs of top-k and top-p are values, and a value is found by bisection over the order of floats: 32 sums over a
row that stays in registers. Equal logits fall on the same side of a cut-off. The reference sorts: ``ar.sampler.sample``
and ``DecodeState.advance``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous

LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _load_scores(logits_ptr, ids, vocabulary, temperature):
    return tl.load(logits_ptr + ids, mask=ids < vocabulary, other=float("-inf")) / temperature


@triton.jit
def _ordered(scores, ids, vocabulary):
    """Maps fp32 to int32 such that integers compare as the floats do, and ids beyond the vocabulary come first."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(ids < vocabulary, tl.where(bits < 0, bits ^ LARGEST, bits), -LARGEST)


@triton.jit
def _upper_middle(low, high):
    """Returns ``(low + high + 1) // 2`` without overflow of int32."""
    return (low >> 1) + (high >> 1) + ((low | high) & 1)


@triton.jit
def _race(weights, scores, peak, noise_ptr, allowed_ptr, ids, vocabulary):
    allowed = tl.load(allowed_ptr + ids, mask=ids < vocabulary, other=0) != 0
    noise = tl.load(noise_ptr + ids, mask=ids < vocabulary, other=1.0)
    race = tl.where(allowed, weights / noise, 0.0)
    # A race without a winner goes to the best allowed score.
    return tl.where(race > 0, race, tl.where(allowed, scores - peak - 1.0, float("-inf")))


@triton.jit
def _draw(
    logits_ptr, noise_ptr, allowed_ptr, temperature_ptr, cut_ptr, kth_ptr, preview_ptr, row, slot, index, vocabulary,
    NOISE_STEPS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Returns the token of index ``index`` of a slot, int64, from a row of logits."""
    logits_ptr += row * vocabulary
    noise_ptr += (slot * NOISE_STEPS + index % NOISE_STEPS) * vocabulary
    allowed_ptr += (index >= tl.load(preview_ptr + slot)).to(tl.int64) * vocabulary
    temperature, cut = tl.load(temperature_ptr + slot), tl.load(cut_ptr + slot)
    top_k = vocabulary - tl.load(kth_ptr + slot)
    # The vocabulary in two blocks, whose sizes must be powers of two.
    ids, ids2 = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    scores = _load_scores(logits_ptr, ids, vocabulary, temperature)
    scores2 = _load_scores(logits_ptr, ids2, vocabulary, temperature)
    order, order2 = _ordered(scores, ids, vocabulary), _ordered(scores2, ids2, vocabulary)
    peak = tl.maximum(tl.max(scores), tl.max(scores2))
    best = tl.maximum(tl.max(order), tl.max(order2))

    # Top-k: the largest value that at least k scores reach.
    low, high = -LARGEST, best
    if top_k < vocabulary:
        while low < high:
            middle = _upper_middle(low, high)
            enough = tl.sum((order >= middle).to(tl.int32)) + tl.sum((order2 >= middle).to(tl.int32)) >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    weights = tl.where(order >= low, tl.exp(scores - peak), 0.0)
    weights2 = tl.where(order2 >= low, tl.exp(scores2 - peak), 0.0)

    # Top-p: the largest value up to which the probabilities sum to no more than the cut; all up to it are dropped.
    limit = cut * (tl.sum(weights) + tl.sum(weights2))
    low, high = -LARGEST, best - 1
    while low < high:
        middle = _upper_middle(low, high)
        below = tl.sum(tl.where(order <= middle, weights, 0.0)) + tl.sum(tl.where(order2 <= middle, weights2, 0.0))
        low = tl.where(below <= limit, middle, low)
        high = tl.where(below <= limit, high, middle - 1)
    weights = tl.where(order > low, weights, 0.0)
    weights2 = tl.where(order2 > low, weights2, 0.0)

    race = _race(weights, scores, peak, noise_ptr, allowed_ptr, ids, vocabulary)
    race2 = _race(weights2, scores2, peak, noise_ptr, allowed_ptr, ids2, vocabulary)
    token = tl.where(tl.max(race) >= tl.max(race2), tl.argmax(race, axis=0), MAIN + tl.argmax(race2, axis=0))
    return token.to(tl.int64)


@triton.jit
def _sample_kernel(
    logits_ptr, noise_ptr, allowed_ptr, temperature_ptr, cut_ptr, kth_ptr, preview_ptr,
    sampled_ptr, tokens_ptr, lengths_ptr, active_ptr, output_ptr, vocabulary, positions,
    NOISE_STEPS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row = tl.program_id(0)
    sampled = tl.load(sampled_ptr + row)
    token = _draw(
        logits_ptr, noise_ptr, allowed_ptr, temperature_ptr, cut_ptr, kth_ptr, preview_ptr, row, row, sampled,
        vocabulary, NOISE_STEPS, MAIN, REST,
    )  # fmt: skip
    active = tl.load(active_ptr + row)
    tl.store(tokens_ptr + row, token)
    tl.store(output_ptr + row * positions + sampled, token)
    tl.store(lengths_ptr + row, tl.load(lengths_ptr + row) + active)
    tl.store(sampled_ptr + row, sampled + active)


@triton.jit
def _sample_window_kernel(
    logits_ptr, noise_ptr, allowed_ptr, temperature_ptr, cut_ptr, kth_ptr, preview_ptr, slots_ptr, indices_ptr,
    drawn_ptr, vocabulary, NOISE_STEPS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0)
    index = tl.load(indices_ptr + row) + 1
    if index > 0:
        slot = tl.load(slots_ptr + row)
        token = _draw(
            logits_ptr, noise_ptr, allowed_ptr, temperature_ptr, cut_ptr, kth_ptr, preview_ptr, row, slot, index,
            vocabulary, NOISE_STEPS, MAIN, REST,
        )  # fmt: skip
        tl.store(drawn_ptr + row, token)


def sample_and_advance(
    logits: Tensor,
    noise: Tensor,
    allowed: Tensor,
    *,
    temperature: Tensor,
    cut: Tensor,
    kth: Tensor,
    preview_tokens: Tensor,
    sampled: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    active: Tensor,
    output: Tensor,
) -> None:
    """Samples one token per row, stores it and advances the active rows.

    Args:
        logits: fp32 [rows, vocabulary].
        noise: fp32 [rows, steps, vocabulary], exponentially distributed; step ``sampled % steps`` is used.
        allowed: bool [2, vocabulary]: ids allowed among the first ``preview_tokens`` tokens, and after them.
        temperature: fp32 [rows, 1].
        cut: fp32 [rows, 1]: 1 - top_p.
        kth: int64 [rows, 1]: vocabulary - top_k.
        preview_tokens: int64 [rows].
        sampled: int64 [rows], tokens sampled so far; advanced.
        tokens: int64 [rows], written: the tokens.
        lengths: int64 [rows], filled positions of the cache; advanced.
        active: int64 [rows], 1 where a row advances, otherwise 0.
        output: int64 [rows, positions], written at ``sampled``.
    """
    rows, vocabulary = logits.shape
    _sample_kernel[(rows,)](
        logits, noise, allowed, temperature, cut, kth, preview_tokens,
        sampled, tokens, lengths, active, output, vocabulary, output.shape[1],
        noise.shape[1], *_blocks(vocabulary), can_overlap(), num_warps=32, launch_pdl=can_overlap(),
    )  # fmt: skip


def sample_window(
    logits: Tensor,
    noise: Tensor,
    allowed: Tensor,
    *,
    temperature: Tensor,
    cut: Tensor,
    kth: Tensor,
    preview_tokens: Tensor,
    slots: Tensor,
    indices: Tensor,
    drawn: Tensor,
) -> None:
    """Samples one token per row, each row for a slot and an index of its own.

    Args as of ``sample_and_advance``, where its rows are slots; and:
        logits: fp32 [rows, vocabulary].
        slots: int64 [rows].
        indices: int64 [rows]: of the token before the sampled one; -1 for a row that samples nothing.
        drawn: int64 [rows], written.
    """
    rows, vocabulary = logits.shape
    _sample_window_kernel[(rows,)](
        logits, noise, allowed, temperature, cut, kth, preview_tokens, slots, indices, drawn, vocabulary,
        noise.shape[1], *_blocks(vocabulary), can_overlap(), num_warps=32, launch_pdl=can_overlap(),
    )  # fmt: skip


def _blocks(vocabulary: int) -> tuple[int, int]:
    """Returns two powers of two that hold the vocabulary."""
    main = triton.next_power_of_2(vocabulary + 1) // 2
    return main, triton.next_power_of_2(max(16, vocabulary - main))

"""Between two linear layers of the decoder: sum, norm, residual, norm, in one pass over a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.int8_pairs import Int8Pairs, store_arguments, store_row
from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous


@triton.jit
def _rms(values, weight, width, eps):
    rstd = tl.rsqrt(tl.sum(values * values) / width + eps)
    normed = (values * rstd).to(tl.bfloat16).to(tl.float32)
    return (normed * weight).to(tl.bfloat16).to(tl.float32)


@triton.jit
def store_embedding(
    token, table_ptr, weight_ptr, residual_ptr, out_ptr, scale_ptr, row, width, eps,
    INT8_PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a token's embedding as a row of the residual, and its norm."""
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    values = tl.load(table_ptr + token * width + cols, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_ptr + row * width + cols, values, mask=mask)
    normed = _rms(values.to(tl.float32), weight, width, eps)
    store_row(out_ptr, scale_ptr, row, cols, mask, normed, width, INT8_PAIR)


@triton.jit
def _embed_norm_kernel(
    tokens_ptr, table_ptr, weight_ptr, residual_ptr, out_ptr, scale_ptr, width, eps,
    INT8_PAIR: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    row = tl.program_id(0)
    wait_for_previous(OVERLAP)
    token = tl.load(tokens_ptr + row)
    store_embedding(token, table_ptr, weight_ptr, residual_ptr, out_ptr, scale_ptr, row, width, eps, INT8_PAIR, BLOCK)


@triton.jit
def sum_of_partials(partials_ptr, rows, row, width, cols, mask, SPLIT_K: tl.constexpr):
    """Adds a row of the partial sums, in order, to 0.0: the sum is never -0.0."""
    sums = tl.zeros(cols.shape, dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        sums += tl.load(partials_ptr + (split * rows + row) * width + cols, mask=mask, other=0.0)
    return sums


@triton.jit
def end_branch(
    sums, residual, after, before, residual_ptr, out_ptr, scale_ptr, row, cols, mask, width, eps,
    INT8_PAIR: tl.constexpr,
):  # fmt: skip
    """Adds the norm of a branch's sums to a row of the residual, and stores the norm of the result."""
    branch = _rms(sums.to(tl.bfloat16).to(tl.float32), after, width, eps)
    residual = (residual + branch).to(tl.bfloat16)
    tl.store(residual_ptr + row * width + cols, residual, mask=mask)
    normed = _rms(residual.to(tl.float32), before, width, eps)
    store_row(out_ptr, scale_ptr, row, cols, mask, normed, width, INT8_PAIR)


@triton.jit
def _residual_norm_kernel(
    partials_ptr, residual_ptr, after_ptr, before_ptr, out_ptr, scale_ptr, rows, width, eps,
    SPLIT_K: tl.constexpr, INT8_PAIR: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    after = tl.load(after_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(before_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    residual = tl.load(residual_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    sums = sum_of_partials(partials_ptr, rows, row, width, cols, mask, SPLIT_K)
    end_branch(sums, residual, after, before, residual_ptr, out_ptr, scale_ptr, row, cols, mask, width, eps, INT8_PAIR)


def embed_norm(
    tokens: Tensor, table: Tensor, weight: Tensor, residual: Tensor, out: Tensor | Int8Pairs, eps: float
) -> None:
    """Writes the embeddings of ``tokens`` int64 [rows] to ``residual`` and their norm to ``out``.

    ``table`` is bf16 [vocabulary, width]; ``residual`` is bf16 and ``out`` bf16 or int8 pairs, [rows, width].
    """
    rows, width = residual.shape
    values, scale, int8_pair = store_arguments(out)
    _embed_norm_kernel[(rows,)](
        tokens, table, weight, residual, values, scale, width, eps,
        int8_pair, triton.next_power_of_2(width), can_overlap(), num_warps=8, launch_pdl=can_overlap(),
    )  # fmt: skip


def residual_norm(
    partials: Tensor, residual: Tensor, after: Tensor, before: Tensor, out: Tensor | Int8Pairs, eps: float
) -> None:
    """Ends one branch and begins the next: ``residual += norm(sum of partials)``, then ``out = norm(residual)``.

    Args:
        partials: fp32 or bf16 [split_k, rows, width], summed in order.
        residual: bf16 [rows, width], updated.
        after: bf16 [width], the weight of the branch's last norm.
        before: bf16 [width], the weight of the next branch's first norm.
        out: bf16 [rows, width] or int8 pairs, written.
        eps: the norms' epsilon.
    """
    split_k, rows, width = partials.shape
    values, scale, int8_pair = store_arguments(out)
    _residual_norm_kernel[(rows,)](
        partials, residual, after, before, values, scale, rows, width, eps,
        split_k, int8_pair, triton.next_power_of_2(width), can_overlap(),
        num_warps=16, launch_pdl=can_overlap(),
    )  # fmt: skip

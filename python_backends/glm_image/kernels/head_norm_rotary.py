"""Layer norm and rotary embedding of all query and key heads in one pass, in place or into the buffers of ranks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.modulated_norm import is_text_row


@triton.jit
def _head_normed(first, second, eps, HALF: tl.constexpr):
    """Layer norm of heads given as halves [heads, HALF]; fp32, rounded to bf16 where diffusers' operators round."""
    mean = (tl.sum(first, axis=1) + tl.sum(second, axis=1)) / (2 * HALF)
    first, second = first - mean[:, None], second - mean[:, None]
    variance = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
    rstd = tl.rsqrt(variance + eps)[:, None]
    first = (first * rstd).to(tl.bfloat16).to(tl.float32)
    second = (second * rstd).to(tl.bfloat16).to(tl.float32)
    return first, second


@triton.jit
def _rotated(first, second, cos_ptr, sin_ptr, token, HALF: tl.constexpr):
    """Rotates heads given as halves [heads, HALF] by the position of an image token."""
    offsets = token * 2 * HALF + tl.arange(0, HALF)
    cos, sin = tl.load(cos_ptr + offsets)[None, :], tl.load(sin_ptr + offsets)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _head_norm_rotary_kernel(
    qkv_ptr, cos_ptr, sin_ptr, stride, heads, eps, first_text, first_rows, second_text,
    HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    dim = tl.arange(0, HALF)
    mask = head[:, None] < heads
    ptrs = qkv_ptr + row.to(tl.int64) * stride + head[:, None] * (2 * HALF) + dim[None, :]
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    first, second = _head_normed(first, second, eps, HALF)
    if not is_text_row(row, first_text, first_rows, second_text):
        token = tl.where(row < first_rows, row - first_text, row - first_rows - second_text)
        first, second = _rotated(first, second, cos_ptr, sin_ptr, token, HALF)
    tl.store(ptrs, first.to(tl.bfloat16), mask=mask)
    tl.store(ptrs + HALF, second.to(tl.bfloat16), mask=mask)


def head_norm_rotary(qkv: Tensor, rotary: tuple[Tensor, Tensor], eps: float, segments: tuple[int, int, int]) -> None:
    """Normalises the query and key heads, and rotates those of image rows by their position.

    Args:
        qkv: bf16 [rows, 3, heads, head_dim], contiguous, head_dim twice a power of two; queries and keys are
            overwritten.
        rotary: cosines and sines, fp32 [image tokens, head_dim] each, the same in both halves of a head.
        eps: the norm's epsilon.
        segments: text rows of the first sequence, all its rows, text rows of the second.
    """
    rows, _, heads, head_dim = qkv.shape
    block = _block(2 * heads)
    _head_norm_rotary_kernel[(rows, triton.cdiv(2 * heads, block))](
        qkv, *rotary, 3 * heads * head_dim, 2 * heads, eps, *segments, block, head_dim // 2, num_warps=4
    )


def _block(heads: int) -> int:
    """Returns the number of heads per program."""
    return min(32, int(triton.next_power_of_2(heads)))


@triton.jit
def _scatter_heads_kernel(
    qkv_ptr, cos_ptr, sin_ptr, text_ptr, image_ptr, heads, of_rank, rank, text, image_rows, eps,
    HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    index = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    dim = tl.arange(0, HALF)
    kind, head = index // heads, index % heads
    owner = head // of_rank
    mask = index < 3 * heads
    source = qkv_ptr + row.to(tl.int64) * (6 * HALF) * heads + index[:, None] * (2 * HALF) + dim[None, :]
    value_first = tl.load(source, mask=mask[:, None], other=0.0).to(tl.float32)
    value_second = tl.load(source + HALF, mask=mask[:, None], other=0.0).to(tl.float32)
    first, second = _head_normed(value_first, value_second, eps, HALF)
    in_row = kind * of_rank + head % of_rank
    if row < text:
        mask = mask & (owner == rank)
        ptrs = text_ptr + ((row * 3 * of_rank + in_row) * (2 * HALF))[:, None] + dim[None, :]
    else:
        token = row - text
        first, second = _rotated(first, second, cos_ptr, sin_ptr, token, HALF)
        image_row = (owner * image_rows + token).to(tl.int64)
        ptrs = image_ptr + ((image_row * 3 * of_rank + in_row) * (2 * HALF))[:, None] + dim[None, :]
    is_value = index[:, None] >= 2 * heads
    first, second = tl.where(is_value, value_first, first), tl.where(is_value, value_second, second)
    tl.store(ptrs, first.to(tl.bfloat16), mask=mask[:, None])
    tl.store(ptrs + HALF, second.to(tl.bfloat16), mask=mask[:, None])


def scatter_heads(
    qkv: Tensor, text: int, rotary: tuple[Tensor, Tensor], eps: float, rank: int, gathered_text: Tensor, image: Tensor
) -> None:
    """``head_norm_rotary`` of one sequence, written to the buffers of the ranks that attend with each head.

    Values are copied as they are.

    Args:
        qkv: bf16 [rows, 3, heads, head_dim], text rows first; contiguous, head_dim twice a power of two.
        text: number of text rows.
        rotary: see ``head_norm_rotary``.
        eps: the norm's epsilon.
        rank: the rank whose heads of the text are written.
        gathered_text: written, bf16 [text, 3, heads / ranks, head_dim], contiguous.
        image: written, bf16 [ranks, rows - text, 3, heads / ranks, head_dim], contiguous.
    """
    rows, _, heads, head_dim = qkv.shape
    block = _block(3 * heads)
    sizes = (heads, heads // len(image), rank, text, rows - text)
    _scatter_heads_kernel[(rows, triton.cdiv(3 * heads, block))](
        qkv, *rotary, gathered_text, image, *sizes, eps, block, head_dim // 2, num_warps=4
    )

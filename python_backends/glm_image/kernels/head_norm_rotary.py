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
    spread = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
    inverse = tl.rsqrt(spread + eps)[:, None]
    first = (first * inverse).to(tl.bfloat16).to(tl.float32)
    second = (second * inverse).to(tl.bfloat16).to(tl.float32)
    return first, second


@triton.jit
def _rotated(first, second, cos_ptr, sin_ptr, token, HALF: tl.constexpr):
    """Rotates heads given as halves [heads, HALF] by the position of an image token."""
    at = token * 2 * HALF + tl.arange(0, HALF)
    cos, sin = tl.load(cos_ptr + at)[None, :], tl.load(sin_ptr + at)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _head_norm_rotary_kernel(
    qkv_ptr, cos_ptr, sin_ptr, stride, heads, eps, first_text, first_rows, second_text,
    HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    at = tl.arange(0, HALF)
    mask = head[:, None] < heads
    place = qkv_ptr + row.to(tl.int64) * stride + head[:, None] * (2 * HALF) + at[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    first, second = _head_normed(first, second, eps, HALF)
    if not is_text_row(row, first_text, first_rows, second_text):
        token = tl.where(row < first_rows, row - first_text, row - first_rows - second_text)
        first, second = _rotated(first, second, cos_ptr, sin_ptr, token, HALF)
    tl.store(place, first.to(tl.bfloat16), mask=mask)
    tl.store(place + HALF, second.to(tl.bfloat16), mask=mask)


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
def _deal_heads_kernel(
    qkv_ptr, cos_ptr, sin_ptr, words_ptr, image_ptr, heads, of_rank, rank, text, image_rows, eps,
    HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    index = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    at = tl.arange(0, HALF)
    kind, head = index // heads, index % heads
    owner = head // of_rank
    mask = index < 3 * heads
    taken = qkv_ptr + row.to(tl.int64) * (6 * HALF) * heads + index[:, None] * (2 * HALF) + at[None, :]
    value_first = tl.load(taken, mask=mask[:, None], other=0.0).to(tl.float32)
    value_second = tl.load(taken + HALF, mask=mask[:, None], other=0.0).to(tl.float32)
    first, second = _head_normed(value_first, value_second, eps, HALF)
    in_row = kind * of_rank + head % of_rank
    if row < text:
        mask = mask & (owner == rank)
        place = words_ptr + ((row * 3 * of_rank + in_row) * (2 * HALF))[:, None] + at[None, :]
    else:
        token = row - text
        first, second = _rotated(first, second, cos_ptr, sin_ptr, token, HALF)
        its_row = (owner * image_rows + token).to(tl.int64)
        place = image_ptr + ((its_row * 3 * of_rank + in_row) * (2 * HALF))[:, None] + at[None, :]
    is_value = index[:, None] >= 2 * heads
    first, second = tl.where(is_value, value_first, first), tl.where(is_value, value_second, second)
    tl.store(place, first.to(tl.bfloat16), mask=mask[:, None])
    tl.store(place + HALF, second.to(tl.bfloat16), mask=mask[:, None])


def deal_heads(
    qkv: Tensor, text: int, rotary: tuple[Tensor, Tensor], eps: float, rank: int, words: Tensor, image: Tensor
) -> None:
    """``head_norm_rotary`` of one sequence, written by whose heads they are; the values go along as they are.

    Args:
        qkv: bf16 [rows, 3, heads, head_dim], of which text comes first; contiguous, head_dim twice a power of two.
        text: rows of text.
        rotary: see ``head_norm_rotary``.
        eps: the norm's epsilon.
        rank: whose heads of the text are wanted.
        words: written, bf16 [text, 3, heads / ranks, head_dim], contiguous.
        image: written, bf16 [ranks, rows - text, 3, heads / ranks, head_dim], contiguous.
    """
    rows, _, heads, head_dim = qkv.shape
    block = _block(3 * heads)
    sizes = (heads, heads // len(image), rank, text, rows - text)
    _deal_heads_kernel[(rows, triton.cdiv(3 * heads, block))](
        qkv, *rotary, words, image, *sizes, eps, block, head_dim // 2, num_warps=4
    )

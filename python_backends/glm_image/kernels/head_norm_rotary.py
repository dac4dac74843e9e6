"""Layer norm of every query and key head, and their rotary embedding, in place and in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.modulated_norm import is_text_row


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
    mean = (tl.sum(first, axis=1) + tl.sum(second, axis=1)) / (2 * HALF)
    first, second = first - mean[:, None], second - mean[:, None]
    spread = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
    inverse = tl.rsqrt(spread + eps)[:, None]
    # Rounded where diffusers' operators round.
    first = (first * inverse).to(tl.bfloat16).to(tl.float32)
    second = (second * inverse).to(tl.bfloat16).to(tl.float32)
    if not is_text_row(row, first_text, first_rows, second_text):
        token = tl.where(row < first_rows, row - first_text, row - first_rows - second_text)
        cos = tl.load(cos_ptr + token * 2 * HALF + at)[None, :]
        sin = tl.load(sin_ptr + token * 2 * HALF + at)[None, :]
        first, second = first * cos - second * sin, second * cos + first * sin
    tl.store(place, first.to(tl.bfloat16), mask=mask)
    tl.store(place + HALF, second.to(tl.bfloat16), mask=mask)


def head_norm_rotary(
    qkv: Tensor, heads: int, head_dim: int, rotary: tuple[Tensor, Tensor], eps: float, segments: tuple[int, int, int]
) -> None:
    """Norms the query and key heads; rotates those of image rows by their place in the picture.

    Args:
        qkv: bf16 [rows, 3 * heads * head_dim]: queries, keys and values; queries and keys are overwritten.
        heads: attention heads.
        head_dim: width of a head, twice a power of two.
        rotary: cosines and sines, fp32 [image tokens, head_dim] each, the same in both halves of a head.
        eps: the norm's epsilon.
        segments: text rows of the first sequence, all its rows, text rows of the second.
    """
    block = min(32, triton.next_power_of_2(2 * heads))
    _head_norm_rotary_kernel[(qkv.shape[0], triton.cdiv(2 * heads, block))](
        qkv, *rotary, qkv.shape[1], 2 * heads, eps, *segments, block, head_dim // 2, num_warps=4
    )

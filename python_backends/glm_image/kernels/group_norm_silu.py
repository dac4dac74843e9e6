"""Group norm and SiLU of an image in channels-last layout, in two passes over it.

torch's group norm needs channels-first memory; convolutions in bf16 need channels-last, and otherwise pay for a
transpose. The reference is torch's group norm followed by its SiLU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 512
"""Programs that compute the statistics: the same number on every device, for the same order of sums."""

TILE = 4096
"""Values that a program holds at a time."""


@triton.jit
def _sums_kernel(x_ptr, parts_ptr, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    part, parts = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, CHANNELS)
    inside = at < channels
    sums = tl.zeros([PIXELS, CHANNELS], dtype=tl.float32)
    squares = tl.zeros([PIXELS, CHANNELS], dtype=tl.float32)
    for first in range(part * PIXELS, pixels, parts * PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        place = x_ptr + pixel[:, None].to(tl.int64) * channels + at[None, :]
        values = tl.load(place, mask=(pixel[:, None] < pixels) & inside[None, :], other=0.0).to(tl.float32)
        sums += values
        squares += values * values
    tl.store(parts_ptr + part * 2 * channels + at, tl.sum(sums, axis=0), mask=inside)
    tl.store(parts_ptr + (part * 2 + 1) * channels + at, tl.sum(squares, axis=0), mask=inside)


@triton.jit
def _factors_kernel(
    parts_ptr, weight_ptr, bias_ptr, factors_ptr, parts, pixels, channels, width, eps,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, WIDTH)
    own = tl.program_id(0) * width + at
    part = tl.arange(0, PARTS)
    mask = (part[:, None] < parts) & (at[None, :] < width)
    place = parts_ptr + part[:, None] * 2 * channels + own[None, :]
    count = pixels.to(tl.float32) * width
    mean = tl.sum(tl.load(place, mask=mask, other=0.0)) / count
    spread = tl.sum(tl.load(place + channels, mask=mask, other=0.0)) / count - mean * mean
    inverse = tl.rsqrt(tl.maximum(spread, 0.0) + eps)
    scale = tl.load(weight_ptr + own, mask=at < width, other=0.0).to(tl.float32) * inverse
    shift = tl.load(bias_ptr + own, mask=at < width, other=0.0).to(tl.float32) - mean * scale
    tl.store(factors_ptr + own, scale, mask=at < width)
    tl.store(factors_ptr + channels + own, shift, mask=at < width)


@triton.jit
def _norm_silu_kernel(x_ptr, factors_ptr, out_ptr, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    at = tl.arange(0, CHANNELS)
    inside = at < channels
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    place = pixel[:, None].to(tl.int64) * channels + at[None, :]
    mask = (pixel[:, None] < pixels) & inside[None, :]
    scale = tl.load(factors_ptr + at, mask=inside, other=0.0)[None, :]
    shift = tl.load(factors_ptr + channels + at, mask=inside, other=0.0)[None, :]
    normed = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) * scale + shift
    # Rounded where torch's operators round.
    normed = normed.to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + place, (normed * tl.sigmoid(normed)).to(tl.bfloat16), mask=mask)


def group_norm_silu(image: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Returns ``silu(group_norm(image))`` of bf16 [1, channels, height, width], channels last in memory.

    ``weight`` and ``bias`` are bf16 [channels]; ``groups`` divides channels.
    """
    _, channels, height, width = image.shape
    pixels, wide = height * width, triton.next_power_of_2(channels)
    tile = max(1, TILE // wide)
    parts = min(PARTS, triton.cdiv(pixels, tile))
    sums = torch.empty(parts, 2, channels, device=image.device, dtype=torch.float32)
    factors = torch.empty(2, channels, device=image.device, dtype=torch.float32)
    out = torch.empty_like(image)
    _sums_kernel[(parts,)](image, sums, pixels, channels, tile, wide, num_warps=8)
    _factors_kernel[(groups,)](
        sums, weight, bias, factors, parts, pixels, channels, channels // groups, eps,
        triton.next_power_of_2(parts), triton.next_power_of_2(channels // groups), num_warps=4,
    )  # fmt: skip
    _norm_silu_kernel[(triton.cdiv(pixels, tile),)](image, factors, out, pixels, channels, tile, wide, num_warps=8)
    return out

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
    channel = tl.arange(0, CHANNELS)
    mask = channel < channels
    sums = tl.zeros([PIXELS, CHANNELS], dtype=tl.float32)
    squares = tl.zeros([PIXELS, CHANNELS], dtype=tl.float32)
    for first in range(part * PIXELS, pixels, parts * PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        ptrs = x_ptr + pixel[:, None].to(tl.int64) * channels + channel[None, :]
        values = tl.load(ptrs, mask=(pixel[:, None] < pixels) & mask[None, :], other=0.0).to(tl.float32)
        sums += values
        squares += values * values
    tl.store(parts_ptr + part * 2 * channels + channel, tl.sum(sums, axis=0), mask=mask)
    tl.store(parts_ptr + (part * 2 + 1) * channels + channel, tl.sum(squares, axis=0), mask=mask)


@triton.jit
def _factors_kernel(
    parts_ptr, weight_ptr, bias_ptr, factors_ptr, parts, pixels, channels, width, eps,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, WIDTH)
    channel = tl.program_id(0) * width + offs
    part = tl.arange(0, PARTS)
    mask = (part[:, None] < parts) & (offs[None, :] < width)
    ptrs = parts_ptr + part[:, None] * 2 * channels + channel[None, :]
    count = pixels.to(tl.float32) * width
    mean = tl.sum(tl.load(ptrs, mask=mask, other=0.0)) / count
    variance = tl.sum(tl.load(ptrs + channels, mask=mask, other=0.0)) / count - mean * mean
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    scale = tl.load(weight_ptr + channel, mask=offs < width, other=0.0).to(tl.float32) * rstd
    shift = tl.load(bias_ptr + channel, mask=offs < width, other=0.0).to(tl.float32) - mean * scale
    tl.store(factors_ptr + channel, scale, mask=offs < width)
    tl.store(factors_ptr + channels + channel, shift, mask=offs < width)


@triton.jit
def _norm_silu_kernel(x_ptr, factors_ptr, out_ptr, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.arange(0, CHANNELS)
    in_channels = channel < channels
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    offsets = pixel[:, None].to(tl.int64) * channels + channel[None, :]
    mask = (pixel[:, None] < pixels) & in_channels[None, :]
    scale = tl.load(factors_ptr + channel, mask=in_channels, other=0.0)[None, :]
    shift = tl.load(factors_ptr + channels + channel, mask=in_channels, other=0.0)[None, :]
    normed = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale + shift
    # Rounded where torch's operators round.
    normed = normed.to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + offsets, (normed * tl.sigmoid(normed)).to(tl.bfloat16), mask=mask)


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

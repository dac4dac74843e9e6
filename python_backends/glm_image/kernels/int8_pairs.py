"""Activations as pairs of int8 values and a scale per row: int8 weights can be multiplied by them without widening.

A value is ``scale * (128 * high + low)``, rounded by at most 2^-15 of its row's largest: in all, less than bf16 rounds
by unless one value is far above thousands of others. Products of int8 add up exactly in int32, in whatever order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_image.kernels.overlap import can_overlap, start_next, wait_for_previous

STEP = tl.constexpr(128)
LARGEST = tl.constexpr(127 * 128)
SMALLEST = tl.constexpr(1e-30)  # lower bound of a row's largest value, so that its inverse is finite


@dataclass(frozen=True)
class Int8Pairs:
    """Rows of activations.

    Attributes:
        values: int8 [rows, 2, width]: high and low values.
        scale: fp32 [rows].
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Int8Pairs:
        return cls(
            torch.empty(rows, 2, width, device=device, dtype=torch.int8),
            torch.empty(rows, device=device, dtype=torch.float32),
        )

    @classmethod
    def of(cls, rows: Tensor) -> Int8Pairs:
        """Quantizes rows [rows, width] in plain torch: the reference of ``quantize_pairs`` and of ``store_row``."""
        values = rows.float()
        largest = values.abs().amax(dim=1).clamp_min(SMALLEST.value)
        whole = (values * (LARGEST.value / largest)[:, None] + 0.5).floor().to(torch.int32)
        high = (whole + STEP.value // 2) >> 7
        pairs = torch.stack([high, whole - STEP.value * high], dim=1).to(torch.int8)
        return cls(pairs, largest / LARGEST.value)


@triton.jit
def store_row(out_ptr, scale_ptr, row, cols, mask, values, width, INT8_PAIR: tl.constexpr):
    """Stores fp32 values of a row, as int8 pairs or as bf16; beyond the row they must be 0."""
    if INT8_PAIR:
        largest = tl.maximum(tl.max(tl.abs(values)), SMALLEST)
        whole = tl.floor(values * (LARGEST / largest) + 0.5).to(tl.int32)
        high = (whole + STEP // 2) >> 7
        ptrs = out_ptr + row * 2 * width + cols
        tl.store(ptrs, high.to(tl.int8), mask=mask)
        tl.store(ptrs + width, (whole - high * STEP).to(tl.int8), mask=mask)
        tl.store(scale_ptr + row, largest / LARGEST)
    else:
        tl.store(out_ptr + row * width + cols, values.to(tl.bfloat16), mask=mask)


@triton.jit
def _quantize_pairs_kernel(x_ptr, out_ptr, scale_ptr, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    start_next(OVERLAP)
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    wait_for_previous(OVERLAP)
    values = tl.load(x_ptr + row * width + cols, mask=cols < width, other=0.0).to(tl.float32)
    store_row(out_ptr, scale_ptr, row, cols, cols < width, values, width, True)


def quantize_pairs(x: Tensor, out: Int8Pairs) -> None:
    """Quantizes bf16 rows [rows, width]."""
    rows, width = x.shape
    _quantize_pairs_kernel[(rows,)](
        x, out.values, out.scale, width, triton.next_power_of_2(width), can_overlap(),
        num_warps=16, launch_pdl=can_overlap(),
    )  # fmt: skip


def store_arguments(out: Tensor | Int8Pairs) -> tuple[Tensor, Tensor, bool]:
    """Returns the arguments of ``store_row``: where values go, where scales go, and whether they are int8 pairs."""
    return (out.values, out.scale, True) if isinstance(out, Int8Pairs) else (out, out, False)

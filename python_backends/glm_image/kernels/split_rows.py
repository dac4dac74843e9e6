"""Activations as two int8 parts and a scale a row: what int8 weights can be multiplied by without being widened.

A value is ``scale * (128 * high + low)``, rounded by at most 2^-15 of its row's largest: in all, less than bf16 rounds
by unless one value stands out from thousands. Products of int8 add up exactly in int32, in whatever order.
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
SMALLEST = tl.constexpr(1e-30)  # a row's largest value counts as no less, so that its inverse is finite


@dataclass(frozen=True)
class SplitRows:
    """Rows of activations.

    Attributes:
        parts: int8 [rows, 2, width]: high and low parts.
        scale: fp32 [rows].
    """

    parts: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> SplitRows:
        """Makes rows to be written."""
        return cls(
            torch.empty(rows, 2, width, device=device, dtype=torch.int8),
            torch.empty(rows, device=device, dtype=torch.float32),
        )

    @classmethod
    def of(cls, rows: Tensor) -> SplitRows:
        """Splits rows [rows, width] in plain torch: the twin of ``split_rows`` and of what norms write."""
        values = rows.float()
        largest = values.abs().amax(dim=1).clamp_min(SMALLEST.value)
        whole = (values * (LARGEST.value / largest)[:, None] + 0.5).floor().to(torch.int32)
        high = (whole + STEP.value // 2) >> 7
        parts = torch.stack([high, whole - STEP.value * high], dim=1).to(torch.int8)
        return cls(parts, largest / LARGEST.value)

    def joined(self) -> Tensor:
        """Returns the values, fp32 [rows, width]."""
        high, low = self.parts.float().unbind(1)
        values: Tensor = self.scale[:, None] * (STEP.value * high + low)
        return values


@triton.jit
def store_row(out_ptr, scale_ptr, row, at, inside, values, width, SPLIT: tl.constexpr):
    """Stores fp32 values of a row, in two parts or as bf16; beyond the row they must be 0."""
    if SPLIT:
        largest = tl.maximum(tl.max(tl.abs(values)), SMALLEST)
        whole = tl.floor(values * (LARGEST / largest) + 0.5).to(tl.int32)
        high = (whole + STEP // 2) >> 7
        place = out_ptr + row * 2 * width + at
        tl.store(place, high.to(tl.int8), mask=inside)
        tl.store(place + width, (whole - high * STEP).to(tl.int8), mask=inside)
        tl.store(scale_ptr + row, largest / LARGEST)
    else:
        tl.store(out_ptr + row * width + at, values.to(tl.bfloat16), mask=inside)


@triton.jit
def _split_rows_kernel(x_ptr, out_ptr, scale_ptr, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    start_next(OVERLAP)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    wait_for_previous(OVERLAP)
    values = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    store_row(out_ptr, scale_ptr, row, at, at < width, values, width, True)


def split_rows(x: Tensor, out: SplitRows) -> None:
    """Splits bf16 rows [rows, width]."""
    rows, width = x.shape
    _split_rows_kernel[(rows,)](
        x, out.parts, out.scale, width, triton.next_power_of_2(width), can_overlap(),
        num_warps=16, launch_pdl=can_overlap(),
    )  # fmt: skip


def destination(out: Tensor | SplitRows) -> tuple[Tensor, Tensor, bool]:
    """Returns the arguments of ``store_row``: where values go, where scales go, and whether rows are split."""
    return (out.parts, out.scale, True) if isinstance(out, SplitRows) else (out, out, False)

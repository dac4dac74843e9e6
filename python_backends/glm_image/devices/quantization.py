"""Matrix products of 8-bit rows: what both factors are, and the product in torch's own operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""By the name that a configuration gives."""

MAX_VALUES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the greatest value of a row becomes."""

MIN_ABS_MAX = 1e-12
"""Stands for the greatest value of a row of zeros."""

ALIGNMENT = 16
"""What the sides of a matrix of weights are multiples of; the products of fp8 demand it, those of int8 half of it."""

MIN_INT8_ROWS = 17
"""The least height of a product of int8 on CUDA."""

MIN_FP8_ROWS = 32
"""The least height that products of fp8 are given on CUDA: for fewer rows cuBLAS lacks some of the shapes."""


class QuantizedRows(NamedTuple):
    """A matrix in 8 bits, ``values * scales``.

    Attributes:
        values: int8 or float8_e4m3fn [rows, k].
        scales: fp32 [rows, 1].
    """

    values: Tensor
    scales: Tensor


def quantize_rows(matrix: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Rounds a matrix [rows, k] to 8 bits, its greatest value to the greatest there is, row by row."""
    full = matrix.float()
    scales = full.abs().amax(dim=1, keepdim=True).clamp_min(MIN_ABS_MAX) / MAX_VALUES[dtype]
    scaled = full / scales
    return QuantizedRows((scaled if dtype.is_floating_point else scaled.round_()).to(dtype), scales)


def scaled_product(rows: QuantizedRows, weight: QuantizedRows, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes ``rows @ weight.T + bias``.

    Args:
        rows: [rows, k].
        weight: [n, k], of the same 8 bits.
        bias: [n].
        dtype: of the result; for fp8 on CUDA bf16 alone.

    Returns:
        [rows, n].
    """
    if rows.values.dtype == torch.int8:
        sums = int8_sums(rows.values, weight.values)
        return (sums * rows.scales * weight.scales.T + bias.float()).to(dtype)
    count = len(rows.values)
    lacking = max(0, MIN_FP8_ROWS - count) if rows.values.is_cuda else 0
    values, scales = (F.pad(part, (0, 0, 0, lacking)) if lacking else part for part in rows)
    product = torch._scaled_mm(
        values,
        weight.values.T,
        scale_a=scales,
        scale_b=weight.scales.T,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return product[:count]


def int8_sums(values: Tensor, weight: Tensor) -> Tensor:
    """Computes ``values @ weight.T`` of int8 [rows, k] and [n, k] in int32, however few the rows are."""
    rows = values.shape[0]
    if rows < MIN_INT8_ROWS:
        values = torch.cat([values, values.new_zeros(MIN_INT8_ROWS - rows, values.shape[1])])
    return torch._int_mm(values, weight.T)[:rows]


def dequantized_product(hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiplies by int8 weights cast to the activations' dtype, which is exact. Shapes as ``Device.int8_product``."""
    return F.linear(hidden, weight.to(hidden.dtype)) * scale.to(hidden.dtype)

"""8-bit quantization by row, and matrix products of quantized factors in torch's operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""By the values of the parameter ``quantization``."""

MAX_VALUES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The quantized value of a row's largest magnitude."""

MIN_ABS_MAX = 1e-12
"""The smallest row maximum that a scale is computed from; avoids a zero scale."""

ALIGNMENT = 16
"""Weight matrices need sides that are multiples of this: required by fp8 products; int8 products require 8."""

MIN_INT8_ROWS = 17
"""The minimum number of rows of an int8 product on CUDA."""

MIN_FP8_ROWS = 32
"""The minimum number of rows of an fp8 product on CUDA: cuBLAS does not support some shapes with fewer."""


class QuantizedRows(NamedTuple):
    """A matrix quantized by row: int8 or float8_e4m3fn ``values`` [rows, k], times fp32 ``scales`` [rows, 1]."""

    values: Tensor
    scales: Tensor


def quantize_rows(matrix: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Quantizes a matrix [rows, k]; each row's largest magnitude becomes the dtype's largest value."""
    full = matrix.float()
    scales = full.abs().amax(dim=1, keepdim=True).clamp_min(MIN_ABS_MAX) / MAX_VALUES[dtype]
    scaled = full / scales
    return QuantizedRows((scaled if dtype.is_floating_point else scaled.round_()).to(dtype), scales)


def scaled_product(rows: QuantizedRows, weight: QuantizedRows, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes ``rows @ weight.T + bias``, [rows, n] in ``dtype``; fp8 on CUDA supports bf16 only.

    ``rows`` are [rows, k], ``weight`` is [n, k] of the same quantized dtype, ``bias`` [n].
    """
    if rows.values.dtype == torch.int8:
        sums = int8_sums(rows.values, weight.values)
        return (sums * rows.scales * weight.scales.T + bias.float()).to(dtype)
    count = len(rows.values)
    padding = max(0, MIN_FP8_ROWS - count) if rows.values.is_cuda else 0
    values, scales = (F.pad(part, (0, 0, 0, padding)) if padding else part for part in rows)
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
    """Computes ``values @ weight.T`` of int8 [rows, k] and [n, k] in int32, for any number of rows."""
    rows = values.shape[0]
    if rows < MIN_INT8_ROWS:
        values = torch.cat([values, values.new_zeros(MIN_INT8_ROWS - rows, values.shape[1])])
    return torch._int_mm(values, weight.T)[:rows]


def dequantized_product(hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiplies by int8 weights cast to the activations' dtype, which is exact. Shapes as ``Device.int8_product``."""
    return F.linear(hidden, weight.to(hidden.dtype)) * scale.to(hidden.dtype)

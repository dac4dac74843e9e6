"""Rows quantized to 8 bits, between two linear layers with int8 or fp8 products, in one pass over a row.

The reference is ``devices.quantization``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_image.devices.quantization import MAX_VALUES, MIN_ABS_MAX, QuantizedRows

SMALLEST = tl.constexpr(MIN_ABS_MAX)

ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added to a value below 2 ** 22 and subtracted again, it rounds to the nearest integer, ties to even."""

GELU_SLOPE = tl.constexpr(1.5957691216057308)
"""2 * sqrt(2 / pi), for the tanh approximation: tanh(x) is ``2 * sigmoid(2 x) - 1``."""

WIDE_ROW = 8192


@triton.jit
def store_row(values, ptrs, scale_ptr, mask, LARGEST: tl.constexpr):
    """Stores a row of bf16 values as it is, or with its scale in an 8-bit type whose largest value is ``LARGEST``."""
    if LARGEST > 0:
        full = values.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(full)), SMALLEST) / LARGEST
        scaled = full / scale
        if ptrs.dtype.element_ty == tl.int8:
            scaled = (scaled + ROUNDING) - ROUNDING
        tl.store(ptrs, scaled.to(ptrs.dtype.element_ty), mask=mask)
        tl.store(scale_ptr, scale)
    else:
        tl.store(ptrs, values, mask=mask)


@triton.jit
def _rows_kernel(
    product_ptr, row_scales_ptr, column_scales_ptr, bias_ptr, out_ptr, scales_ptr, width,
    SUMS: tl.constexpr, GELU: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    offsets = row.to(tl.int64) * width + cols
    values = tl.load(product_ptr + offsets, mask=mask, other=0).to(tl.float32)
    if SUMS:
        scales = tl.load(column_scales_ptr + cols, mask=mask, other=0.0)
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        values = values * tl.load(row_scales_ptr + row) * scales + bias
        values = values.to(tl.bfloat16).to(tl.float32)
    if GELU:
        values = values * tl.sigmoid((values + 0.044715 * values * values * values) * GELU_SLOPE)
    store_row(values.to(tl.bfloat16), out_ptr + offsets, scales_ptr + row, mask, LARGEST)


def store_arguments(out: Tensor | QuantizedRows) -> tuple[Tensor, Tensor, float]:
    """Returns the arguments of ``store_row``: where values go, where scales go, and the largest 8-bit value or 0."""
    return (*out, MAX_VALUES[out.values.dtype]) if isinstance(out, QuantizedRows) else (out, out, 0.0)


def quantize_rowwise(product: Tensor, dtype: torch.dtype, *, gelu: bool = False) -> QuantizedRows:
    """Quantizes bf16 [rows, width] to int8 or float8_e4m3fn; with ``gelu``, its GELU in the tanh approximation."""
    out = empty_rows(product, dtype)
    _launch(product, None, out, gelu=gelu)
    return out


def sums_in_8_bits(sums: Tensor, rows: QuantizedRows, weight: QuantizedRows, bias: Tensor) -> QuantizedRows:
    """Quantizes the GELU of an int8 layer, given ``sums`` int32 [rows, n] of ``rows.values @ weight.values.T``."""
    out = empty_rows(sums, rows.values.dtype)
    _launch(sums, (rows.scales, weight.scales, bias), out, gelu=True)
    return out


def sums_to_bf16(sums: Tensor, rows: QuantizedRows, weight: QuantizedRows, bias: Tensor) -> Tensor:
    """Returns an int8 layer's result, bf16 [rows, n]; see ``sums_in_8_bits``."""
    out = torch.empty_like(sums, dtype=torch.bfloat16)
    _launch(sums, (rows.scales, weight.scales, bias), out, gelu=False)
    return out


def empty_rows(like: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Allocates 8-bit rows of the shape of ``like``."""
    scales = torch.empty(like.shape[0], 1, device=like.device, dtype=torch.float32)
    return QuantizedRows(torch.empty_like(like, dtype=dtype), scales)


def _launch(
    product: Tensor, factors: tuple[Tensor, Tensor, Tensor] | None, out: Tensor | QuantizedRows, *, gelu: bool
) -> None:
    rows, width = product.shape
    values, scales, largest = store_arguments(out)
    _rows_kernel[(rows,)](
        product, *(factors or (product, product, product)), values, scales, width,
        factors is not None, gelu, largest, triton.next_power_of_2(width),
        num_warps=16 if width > WIDE_ROW else 8,
    )  # fmt: skip

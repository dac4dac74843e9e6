"""Between two linear layers of a DiT block: gated residual, norm and modulation in one pass over a row."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from glm_image.devices.quantization import QuantizedRows
from glm_image.kernels.rows import store_arguments, store_row

SHIFT_ATTENTION, SCALE_ATTENTION, GATE_ATTENTION, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)
"""Rows of a modulation table, each for image tokens and for text tokens."""


@triton.jit
def is_text_row(row, first_text, first_rows, second_text):
    """Returns whether a row is text, in one or two sequences that each begin with their text."""
    return tl.where(row < first_rows, row < first_text, row - first_rows < second_text)


@triton.jit
def _modulated_norm_kernel(
    residual_ptr, branch_ptr, gates_ptr, table_ptr, out_ptr, scales_ptr, width, eps,
    first_text, first_rows, second_text,
    GATE: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    stream = is_text_row(row, first_text, first_rows, second_text).to(tl.int32)
    offsets = row.to(tl.int64) * width + cols
    values = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gates_ptr + (GATE * 2 + stream) * width + cols, mask=mask, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounded where diffusers' operators round.
        rounded = (values + (branch * gate).to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16)
        tl.store(residual_ptr + offsets, rounded, mask=mask)
        values = rounded.to(tl.float32)
    if HAS_NORM:
        centred = tl.where(mask, values - tl.sum(values) / width, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)
        scale = tl.load(table_ptr + (SCALE * 2 + stream) * width + cols, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(table_ptr + (SHIFT * 2 + stream) * width + cols, mask=mask, other=0.0).to(tl.float32)
        modulated = normed.to(tl.bfloat16).to(tl.float32) * (1.0 + scale) + shift
        store_row(modulated.to(tl.bfloat16), out_ptr + offsets, scales_ptr + row, mask, LARGEST)


class GatedBranch(NamedTuple):
    """The end of a branch: its output bf16 [rows, width], multiplied by row ``gate`` of a modulation table."""

    output: Tensor
    table: Tensor
    gate: int


def modulated_norm(
    residual: Tensor,
    table: Tensor | None,
    out: Tensor | QuantizedRows,
    eps: float,
    segments: tuple[int, int, int],
    shift: int,
    scale: int,
    branch: GatedBranch | None = None,
) -> None:
    """Computes ``residual += branch * gate``, then ``out = norm(residual) * (1 + scale) + shift``.

    The first part needs a branch, the second a table; one of them is given.

    Args:
        residual: bf16 [rows, width], updated if there is a branch.
        table: bf16 [12 * width]: shift, scale and gate of attention, then of the MLP, each for image then text rows.
        out: bf16 or 8-bit [rows, width], written if there is a table.
        eps: the norm's epsilon.
        segments: text rows of the first sequence, all its rows, text rows of the second.
        shift: row of the table.
        scale: row of the table.
        branch: the branch that ends here.
    """
    rows, width = residual.shape
    output, gates, gate = branch or (residual, table, 0)
    values, scales, largest = store_arguments(out)
    _modulated_norm_kernel[(rows,)](
        residual, output, gates, gates if table is None else table, values, scales, width, eps, *segments,
        gate, shift, scale, branch is not None, table is not None, largest,
        triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip

"""The gated product of an MLP, in one pass over the output of its first layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _silu_product_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate = tl.load(gate_up_ptr + row * 2 * width + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + cols, mask=mask, other=0.0).to(tl.float32)
    # Rounded where torch's operators round.
    silu = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + row * width + cols, (up * silu).to(tl.bfloat16), mask=mask)


def silu_product(gate_up: Tensor) -> Tensor:
    """Returns ``up * silu(gate)``, bf16 [rows, width], of bf16 [rows, 2 * width]: gate, then up."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, device=gate_up.device, dtype=gate_up.dtype)
    _silu_product_kernel[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, BLOCK, num_warps=4)
    return out

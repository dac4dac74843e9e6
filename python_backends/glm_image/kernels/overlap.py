"""Kernels that start before their predecessor has ended (programmatic dependent launch, compute capability 9).

Every kernel of a chain lets its successor start early: a small one at its start, one that fills the device after its
loop. The successor prefetches what no predecessor writes (weights, into the L2 cache), and only then waits. So memory
stays busy while small kernels run.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OVERLAP_CAPABILITY = 9

FETCH_UNIT = 16
"""Alignment of the addresses and lengths of ``fetch``, in bytes."""


@functools.cache
def can_overlap() -> bool:
    """Returns whether the current device supports programmatic dependent launch."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= OVERLAP_CAPABILITY


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """Lets the next kernel start; until it waits, it may only read what this kernel does not write."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Waits until the previous kernel, and so all before it, has ended and its writes are visible."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def fetch(pointers, BYTES: tl.constexpr, OVERLAP: tl.constexpr):
    """Prefetches ``BYTES`` from each pointer on into the L2 cache; both are multiples of ``FETCH_UNIT``."""
    if OVERLAP and BYTES > 0:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [pointers.to(tl.int64), tl.full(pointers.shape, BYTES, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

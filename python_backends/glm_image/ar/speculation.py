"""Jacobi decoding on the host: how many tokens each slot guesses. Touches no tensors.

Widths of windows and row counts change only how soon tokens come, never which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_ROWS: Final = 128
"""Rows up to which a step takes about as long as its weights take to be read, on accelerators."""

CAPTURED_ROWS: Final = (16, 32, 64, 128)
HOST_ROWS: Final = 8
"""The CPU computes any multiple."""


def row_counts(slots: int, window: int, *, is_host: bool) -> tuple[int, ...]:
    """Returns the numbers of rows that steps may have, ascending: enough for a row of every slot."""
    most = max(slots, min(slots * window, MAX_ROWS))
    if is_host:
        return tuple(range(HOST_ROWS, most + HOST_ROWS, HOST_ROWS))
    return _up_to(CAPTURED_ROWS, most)


def _up_to(counts: Sequence[int], most: int) -> tuple[int, ...]:
    fitting = tuple(count for count in counts if count < most)
    larger = [count for count in counts if count >= most]
    return (*fitting, larger[0] if larger else most)


def rows_for(needed: int, counts: Sequence[int]) -> int:
    """Returns the least row count for ``needed`` rows."""
    return next(count for count in counts if count >= needed)

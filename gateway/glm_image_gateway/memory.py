"""Settings of the C library's allocator."""

from __future__ import annotations

import ctypes
from typing import Final

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
KEPT_BYTES: Final = 64 << 20
"""Freed memory at the end of the heap that is not returned to the system."""
LARGEST_BYTES: Final = 32 << 20
"""The largest block that comes from the heap; glibc takes no higher value."""


def keep_freed_memory() -> None:
    """Has the allocator reuse large blocks, where it is glibc's.

    By default each block of several megabytes is mapped anew, and the kernel clears it page by page. An image passes
    through several such blocks; so they cost more time than all else that the gateway does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)

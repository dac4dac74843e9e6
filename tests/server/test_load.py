"""Many small requests from eight clients over both protocols: all responses are correct, and no process grows."""

from __future__ import annotations

from pathlib import Path

import pytest
from servers import processes
from soak import soak

from glm_image.supervisor import TritonServer

MEGABYTE = 1024 * 1024
CLIENTS = 8
WARM = 40
"""Requests after which every thread has its buffers."""

MAY_GROW = {
    "tritonserver": 6 * MEGABYTE,
    "glm_ar": 6 * MEGABYTE,
    "glm_dit": 12 * MEGABYTE,
    "glm_control": MEGABYTE,
    "glm_image_stream": MEGABYTE,
}
"""Fluctuation of the allocators; a leak of ten kilobytes a request would exceed it in a thousand requests."""


@pytest.mark.parametrize(
    ("requests", "round_size"), [(80, 20), pytest.param(1000, 100, marks=pytest.mark.full)], ids=str
)
def test_load_gets_correct_responses_and_leaks_nothing(triton: TritonServer, requests: int, round_size: int) -> None:
    pids = processes(triton)
    regions = sorted(Path("/dev/shm").glob(f"{triton.shm_prefix}*"))
    rounds = list(soak(triton, requests, CLIENTS, round_size))
    print(*rounds, sep="\n")
    assert (rounds[-1].answered, rounds[-1].wrong) == (requests, 0)
    assert processes(triton) == pids
    assert set(pids) == set(MAY_GROW)
    warm = next(point for point in rounds if point.answered >= WARM)
    for name, most in MAY_GROW.items():
        assert rounds[-1].resident_bytes[name] - warm.resident_bytes[name] < most
    assert sorted(Path("/dev/shm").glob(f"{triton.shm_prefix}*")) == regions
    assert rounds[-1].shared_memory_bytes == warm.shared_memory_bytes

"""Many small requests from eight clients over both protocols: every answer right, no process larger for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.soak import processes, soak
from glm_image.supervisor import TritonServer

MEGABYTE = 1024 * 1024
CLIENTS = 8
WARM = 80
"""Requests after which every thread has its buffers."""

MAY_GROW = {
    "tritonserver": 6 * MEGABYTE,
    "glm_ar": 6 * MEGABYTE,
    "glm_dit": 12 * MEGABYTE,
    "glm_control": MEGABYTE,
    "glm_image_stream": MEGABYTE,
}
"""What allocators take and give back; ten kilobytes kept of each of a thousand requests would be more."""


@pytest.mark.parametrize(
    ("requests", "size_of_round"), [(120, 20), pytest.param(1000, 100, marks=pytest.mark.full)], ids=str
)
def test_a_load_is_answered_and_leaves_nothing_behind(triton: TritonServer, requests: int, size_of_round: int) -> None:
    pids = processes(triton)
    regions = sorted(Path("/dev/shm").glob(f"{triton.shm_prefix}*"))
    curve = list(soak(triton, requests, CLIENTS, size_of_round))
    print(*curve, sep="\n")
    assert (curve[-1].answered, curve[-1].wrong) == (requests, 0)
    assert processes(triton) == pids
    assert set(pids) == set(MAY_GROW)
    warm = next(point for point in curve if point.answered >= WARM)
    for name, most in MAY_GROW.items():
        assert curve[-1].resident_bytes[name] - warm.resident_bytes[name] < most
    assert sorted(Path("/dev/shm").glob(f"{triton.shm_prefix}*")) == regions
    assert curve[-1].shared_memory_bytes == warm.shared_memory_bytes

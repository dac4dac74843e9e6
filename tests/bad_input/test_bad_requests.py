"""Invalid requests of every kind: refused immediately with a message; the server stays as it was."""

from __future__ import annotations

import http.client
import json
import os
import re
import statistics
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bad_input.shapes import (
    DEPTH,
    binary_cases,
    generate_cases,
    grpc_cases,
    header_cases,
    http_cases,
    json_cases,
    stage_cases,
)
from bad_input.values import value_cases
from bad_input.wire import Case
from bench.soak import processes, resident_bytes
from glm_image.supervisor import TritonServer
from helpers import wait_until
from server.kserve import Values, grpc_infer

CASES: dict[str, Case] = {
    **value_cases(),
    **grpc_cases(),
    **binary_cases(),
    **json_cases(),
    **generate_cases(),
    **http_cases(),
    **header_cases(),
    **stage_cases(),
}
REPEATED = [
    case for name, case in CASES.items() if not any(part in name for part in ("nested", "long id", "id b'xxxx'"))
]
"""Without those that move megabytes of Triton's memory: nesting, and ids of a megabyte."""
SECONDS = 1
LOADED_MACHINE = 5
"""The factor by which a machine with other load may be slower."""

MEGABYTE = 1024 * 1024
HTTP_THREADS = 8
PICTURE: Values = {"prompt": "a fox", "height": 40, "width": 64, "num_inference_steps": 2, "seed": 3}
ROUNDS = 4
NOISE_BYTES = 3 * MEGABYTE
"""What allocators take and give back; a kilobyte kept of each request would be more."""


STEADY_READS = 10
"""Reads of Triton's counts over which they must not change."""


def answered(server: TritonServer, model: str) -> int:
    """How many requests a model has answered, as Triton counts them: of a stage alone, refusals too."""
    with closing(http.client.HTTPConnection(server.http_url)) as connection:
        connection.request("GET", f"/v2/models/{model}/stats")
        (stats,) = json.load(connection.getresponse())["model_stats"]
    count: int = stats["inference_stats"]["success"]["count"]
    return count


@pytest.fixture(scope="module", autouse=True)
def all_counted(triton: TritonServer) -> None:
    """Waits until Triton has counted the requests of earlier tests: it does so shortly after it has answered them."""
    counts: list[list[int]] = []

    def is_steady() -> bool:
        counts.append([answered(triton, model) for model in ("glm_image", "glm_dit")])
        return len(counts) >= STEADY_READS and counts[-1] == counts[-STEADY_READS]

    assert wait_until(is_steady)


def cpu_seconds(pids: Iterable[int]) -> float:
    """What processes have computed so far."""
    times = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
    return sum(int(ticks) for pair in times for ticks in pair) / os.sysconf("SC_CLK_TCK")


def test_list_has_at_least_300_requests() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("name", CASES)
def test_bad_request_is_refused_with_a_message_before_computation(triton: TritonServer, name: str) -> None:
    case = CASES[name]
    models = ["glm_image"] if name.startswith("glm_dit ") else ["glm_image", "glm_dit"]
    before = [answered(triton, model) for model in models]
    answer = case.send(triton)
    assert answer.status in case.statuses, answer
    assert re.search(case.pattern, answer.message), answer
    assert answer.message
    assert answer.seconds < SECONDS * LOADED_MACHINE
    assert [answered(triton, model) for model in models] == before


def test_bad_requests_leave_no_memory_and_no_process(triton: TritonServer) -> None:
    """Sent repeatedly: same image, same processes, same memory and shared memory, no computation."""
    image = grpc_infer(triton, PICTURE)["images"]
    pids = processes(triton)
    assert set(pids) == {"tritonserver", "glm_ar", "glm_dit", "glm_control", "glm_image_stream"}
    stages = pids["glm_ar"], pids["glm_dit"]
    began = cpu_seconds(stages)
    grpc_infer(triton, PICTURE)
    image_seconds = cpu_seconds(stages) - began
    seconds = [case.send(triton).seconds for case in CASES.values()]
    assert statistics.median(seconds) < SECONDS
    assert cpu_seconds(stages) - began - image_seconds < len(CASES) * image_seconds / 10
    regions = sorted(Path("/dev/shm").glob(f"{triton.shm_prefix}*"))
    sizes = [region.stat().st_size for region in regions]
    curve = [{name: resident_bytes(pid) for name, pid in pids.items()}]
    for _ in range(ROUNDS):
        for case in REPEATED:
            case.send(triton)
        curve.append({name: resident_bytes(pid) for name, pid in pids.items()})
    assert processes(triton) == pids
    for name in pids:
        assert curve[-1][name] - curve[0][name] < NOISE_BYTES, curve
    assert sorted(Path("/dev/shm").glob(f"{triton.shm_prefix}*")) == regions
    assert [region.stat().st_size for region in regions] == sizes
    np.testing.assert_array_equal(grpc_infer(triton, PICTURE)["images"], image)


def test_nested_json_keeps_at_most_the_stacks_of_the_threads(triton: TritonServer) -> None:
    """Triton 2.51 recurses into it; what a thread's stack once needed, it keeps."""
    pid = processes(triton)["tritonserver"]
    before = resident_bytes(pid)
    for _ in range(10 * HTTP_THREADS):
        CASES[f"data nested {DEPTH} deep"].send(triton)
    assert resident_bytes(pid) - before < HTTP_THREADS * 40 * MEGABYTE

"""Requests that are wrong, each in its own way: refused in words and at once, the server as it was before."""

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

from bad_input.shapes import DEPTH, binary_cases, generate_cases, grpc_cases, http_cases, json_cases, stage_cases
from bad_input.values import value_cases
from bad_input.wire import Case
from bench.soak import processes, resident_bytes
from glm_image.supervisor import TritonServer
from server.kserve import Values, grpc_infer

CASES: dict[str, Case] = {
    **value_cases(),
    **grpc_cases(),
    **binary_cases(),
    **json_cases(),
    **generate_cases(),
    **http_cases(),
    **stage_cases(),
}
SHALLOW = [case for name, case in CASES.items() if "nested" not in name]
SECONDS = 1
LOADED_MACHINE = 5
"""How many times slower a machine may be that has other things to do."""

MEGABYTE = 1024 * 1024
HTTP_THREADS = 8
PICTURE: Values = {"prompt": "a fox", "height": 40, "width": 64, "num_inference_steps": 2, "seed": 3}
ROUNDS = 4
NOISE_BYTES = 3 * MEGABYTE
"""What allocators take and give back; a kilobyte kept of each request would be more."""


def answered(server: TritonServer, model: str) -> int:
    """How many requests a model has answered, as Triton counts them: of a stage alone, refusals too."""
    with closing(http.client.HTTPConnection(server.http_url)) as connection:
        connection.request("GET", f"/v2/models/{model}/stats")
        (told,) = json.load(connection.getresponse())["model_stats"]
    count: int = told["inference_stats"]["success"]["count"]
    return count


def cpu_seconds(pids: Iterable[int]) -> float:
    """What processes have computed so far."""
    times = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
    return sum(int(ticks) for pair in times for ticks in pair) / os.sysconf("SC_CLK_TCK")


def test_there_are_enough() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_is_refused_in_words_before_any_compute(triton: TritonServer, name: str) -> None:
    case = CASES[name]
    models = ["glm_image"] if name.startswith("glm_dit ") else ["glm_image", "glm_dit"]
    before = [answered(triton, model) for model in models]
    answer = case.send(triton)
    assert answer.status in case.statuses, answer
    assert re.search(case.words, answer.message), answer
    assert answer.message
    assert answer.seconds < SECONDS * LOADED_MACHINE
    assert [answered(triton, model) for model in models] == before


def test_the_whole_list_leaves_nothing_behind(triton: TritonServer) -> None:
    """Sent over and over: same picture, same processes, as much memory, the same shared memory, nothing drawn."""
    picture = grpc_infer(triton, PICTURE)["images"]
    pids = processes(triton)
    assert set(pids) == {"tritonserver", "glm_ar", "glm_dit", "glm_control", "glm_image_stream"}
    stages = pids["glm_ar"], pids["glm_dit"]
    began = cpu_seconds(stages)
    grpc_infer(triton, PICTURE)
    one_picture = cpu_seconds(stages) - began
    seconds = [case.send(triton).seconds for case in CASES.values()]
    assert statistics.median(seconds) < SECONDS
    assert cpu_seconds(stages) - began - one_picture < len(CASES) * one_picture / 10
    regions = sorted(Path("/dev/shm").glob(f"{triton.shm_prefix}*"))
    sizes = [region.stat().st_size for region in regions]
    curve = [{name: resident_bytes(pid) for name, pid in pids.items()}]
    for _ in range(ROUNDS):
        for case in SHALLOW:
            case.send(triton)
        curve.append({name: resident_bytes(pid) for name, pid in pids.items()})
    assert processes(triton) == pids
    for name in pids:
        assert curve[-1][name] - curve[0][name] < NOISE_BYTES, curve
    assert sorted(Path("/dev/shm").glob(f"{triton.shm_prefix}*")) == regions
    assert [region.stat().st_size for region in regions] == sizes
    np.testing.assert_array_equal(grpc_infer(triton, PICTURE)["images"], picture)


def test_nested_json_keeps_no_more_than_the_stacks_of_the_threads(triton: TritonServer) -> None:
    """Triton 2.51 recurses into it; what a thread's stack once needed, it keeps."""
    pid = processes(triton)["tritonserver"]
    before = resident_bytes(pid)
    for _ in range(10 * HTTP_THREADS):
        CASES[f"data nested {DEPTH} deep"].send(triton)
    assert resident_bytes(pid) - before < HTTP_THREADS * 40 * MEGABYTE

"""Every benchmark of a server runs, briefly, against the running one, and its figures are consistent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import soak

from benchmarks.lines import Line, all_of, check_ceiling, check_figures, only, run
from glm_image.supervisor import TritonServer

CLOSE = pytest.approx
ROUNDED = 2e-3
"""Relative: lines have four digits."""

STAGES = {"ar_queue", "prefill", "decode", "dit_queue", "condition", "denoise", "vae"}


@pytest.fixture
def brief(triton: TritonServer) -> list[object]:
    return ["--brief", "--url", triton.http_url, "--grpc-url", triton.grpc_url]


def check_loads(lines: list[Line], driver: str) -> None:
    for load in all_of(lines, "load"):
        assert (load["driver"], load["requests"], load["failed"]) == (driver, 4, 0)
        assert load["requests_per_second"] > 0
        assert 0 < load["p50_seconds"] <= load["p90_seconds"] <= load["p99_seconds"]
    for counts in all_of(lines, "triton"):
        assert counts["count"] >= 4
        assert counts["failed"] == 0
        assert counts["success_seconds"] >= counts["compute_infer_seconds"] > 0
    for stages in all_of(lines, "stages"):
        assert set(stages) > STAGES


def test_served(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "served", *brief, "--driver", "own", "--concurrency", "1,2", "--pid", os.getpid())
    check_loads(lines, "own")
    assert [line["concurrency"] for line in all_of(lines, "load")] == [1, 2]
    assert only(lines, "request") == {"measure": "request", "size": "64x64", "steps": 2}
    memory = {line["process"]: line for line in all_of(lines, "memory")}
    assert set(memory) >= {"tritonserver", "glm_ar", "glm_dit", "glm_control", "glm_image_stream"}
    # A stub has torch loaded at least.
    assert min(memory["glm_ar"]["peak_bytes"], memory["glm_dit"]["peak_bytes"]) > 100e6
    assert all(line["peak_bytes"] >= line["resident_bytes"] > 0 for line in memory.values())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_served_with_perf_analyzer(
    capsys: pytest.CaptureFixture[str], brief: list[object], protocol: str, tmp_path: Path
) -> None:
    if shutil.which(os.environ.get("PERF_ANALYZER") or "perf_analyzer") is None:
        pytest.skip("this machine has no perf_analyzer")
    data = tmp_path / "data.json"
    request = {
        "prompt": ["雪 “X”"],
        "width": [32],
        "height": [32],
        "num_inference_steps": [1],
        "output_format": ["png"],
    }
    data.write_text(json.dumps({"data": [request]}))
    options = ["--protocol", protocol, "--input-data", data, "--driver", "perf_analyzer", "--concurrency", "1,2"]
    lines = run(capsys, "served", *brief, *options, "--request-rate", "4")
    check_loads(lines, "perf_analyzer")
    assert len(all_of(lines, "load")) == 3
    assert [line["rate"] for line in all_of(lines, "load") if "rate" in line] == [4]


def test_served_at_a_rate_reports_failures(
    capsys: pytest.CaptureFixture[str], brief: list[object], tmp_path: Path
) -> None:
    data = tmp_path / "data.json"
    good = {"prompt": ["a"], "width": [32], "height": [32], "num_inference_steps": [1], "output_format": ["png"]}
    data.write_text(json.dumps({"data": [good, {**good, "width": [31]}]}))
    options = ["--input-data", data, "--driver", "own", "--concurrency", "", "--request-rate", "20"]
    load = only(run(capsys, "served", *brief, *options, code=1), "load")
    assert (load["rate"], load["failed"], load["errors"]) == (20, 2, ["width is 31; allowed: 32 to 2048"])


def test_stream(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    check_stream(run(capsys, "stream", *brief))


def check_stream(lines: list[Line]) -> None:
    alone, steady = only(lines, "alone"), only(lines, "steady stream")
    assert [line["number"] for line in all_of(lines, "answered")] == [1, 2, 3, 4, 5]
    assert lines.index(alone) < lines.index(all_of(lines, "answered")[0])
    assert (steady["requests"], steady["concurrency"], steady["mps"]) == (4, 3, False)
    assert min(alone["ar_seconds"], alone["dit_seconds"], alone["vae_seconds"]) > 0
    assert steady["pictures_per_second"] > 0
    assert steady["to_bound"] == CLOSE(steady["pictures_per_second"] / steady["bound_per_second"], rel=1e-2)
    only(lines, "in the stream")


def test_streaming(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "streaming", *brief)
    for stage in ("decode", "denoise"):
        closed = only(lines, f"closed to free in {stage}")
        assert 0 < closed["median_seconds"] <= closed["worst_seconds"]
    plain, pictures = only(lines, "alone, plain"), only(lines, "alone, pictures")
    assert pictures["cost"] == CLOSE(pictures["seconds"] / plain["seconds"] - 1, abs=1e-2)
    assert 0 < pictures["first_picture_seconds"] < pictures["seconds"]
    together = only(lines, "2 together, pictures")
    assert together["with_pictures"] == together["requests"] == 2
    assert {"throughput_loss", "p99_loss"} < set(together)


def test_cards(capsys: pytest.CaptureFixture[str], brief: list[object], triton: TritonServer) -> None:
    options = [*brief, "--metrics-url", triton.metrics_url, "--devices", "cpu"]
    lines = run(capsys, "cards", "instances", *options)
    assert only(lines, "several instances")["speedup"] == 1
    assert only(lines, "an instance", device="cpu")["steps"] >= 10
    check_pipeline(run(capsys, "cards", "pipeline", *brief))


def check_pipeline(lines: list[Line]) -> None:
    both, pipelined = only(lines, "both stages"), only(lines, "pipelined")
    rates = {name: only(lines, f"{name} alone")["pictures_per_second"] for name in ("glm_ar", "glm_dit")}
    assert pipelined["slower"] == min(rates, key=rates.__getitem__)
    assert pipelined["to_slower"] == CLOSE(both["pictures_per_second"] / min(rates.values()), rel=1e-2)


def test_plan(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    check_plan(run(capsys, "plan", *brief, "--dit", "cpu:1"))


def check_plan(lines: list[Line]) -> None:
    most, host = only(lines, "most_a_second"), only(lines, "host")
    assert most["ratio"] == CLOSE(1, abs=0.02) or most["cores"] == CLOSE(2, rel=1e-2)
    assert host["cores_used"] > 0
    for name in ("p50_seconds", "p99_seconds", "images_per_second"):
        line = only(lines, name)
        assert line["ratio"] == CLOSE(line["predicted"] / line["measured"], rel=1e-2)


def test_soak(capsys: pytest.CaptureFixture[str], triton: TritonServer) -> None:
    assert soak.measure(triton, soak.parse_arguments(["--brief"])) == 0
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    check_figures(lines)
    assert [(line["answered"], line["wrong"]) for line in all_of(lines, "round")] == [(8, 0), (16, 0)]


@pytest.mark.full
def test_served_with_its_own_server(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "served", "--brief", "--driver", "own")
    check_ceiling(lines[1:])
    check_loads(lines, "own")
    assert {line["process"] for line in all_of(lines, "memory")} > {"tritonserver", "glm_ar", "glm_dit"}


@pytest.mark.full
def test_cards_with_its_own_servers(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "cards", "instances", "--brief")
    one, two = all_of(lines, "glm_dit alone")
    assert [(line["instances"], line["requests"]) for line in (one, two)] == [(1, 4), (2, 8)]
    several = only(lines, "several instances")
    assert several["speedup"] == CLOSE(two["pictures_per_second"] / one["pictures_per_second"], rel=1e-2)
    check_pipeline(run(capsys, "cards", "pipeline", "--brief"))


@pytest.mark.full
def test_plan_with_its_own_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Checks the figures alone: how close the simulation comes is for a machine without other load."""
    options = ["--alone", "4", "--busy", "20", "--requests", "20", "--dit", "cpu:1", "--admission", "gathered"]
    check_plan(run(capsys, "plan", "--brief", *options))


@pytest.mark.full
def test_fleet_with_its_own_servers(capsys: pytest.CaptureFixture[str]) -> None:
    """Checks the figures alone, as for ``plan``."""
    lines = run(capsys, "fleet", "--brief", "--dit", "2")
    assert only(lines, "most_a_second")["cores"] > 0
    for policy in ("gateway", "round-robin"):
        assert only(lines, "host", policy=policy)["cores_used"] > 0
        for source in ("alone", "run"):
            line = only(lines, "p50_seconds", policy=policy, **{"from": source})
            assert line["ratio"] == CLOSE(line["predicted"] / line["measured"], rel=1e-2)


@pytest.mark.full
def test_stream_with_other_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = ["--parameter", "glm_dit.quantization=int8", "--parameter", "glm_ar.admission=gathered"]
    check_stream(run(capsys, "stream", "--brief", *parameters))

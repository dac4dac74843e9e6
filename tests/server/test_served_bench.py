"""The benchmark of a served checkpoint, briefly: every request succeeds and every measure is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glm_image.supervisor import TritonServer

PROGRAM = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "served.py"
BRIEF = ["--size", "64x64", "--steps", "2", "--requests", "4"]
PROGRAM_SECONDS = 240


def bench(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
    return other_bench(PROGRAM.name, *BRIEF, *arguments, code=code)


def other_bench(name: str, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    command = [sys.executable, str(PROGRAM.with_name(name)), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
    assert ended.returncode == code, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def measures(lines: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["measure"] == measure]


def check_loads(lines: list[dict[str, Any]], driver: str) -> None:
    for told in measures(lines, "load"):
        assert (told["driver"], told["requests"], told["failed"]) == (driver, 4, 0)
        assert told["requests_per_second"] > 0
        assert 0 < told["p50_seconds"] <= told["p90_seconds"] <= told["p99_seconds"]
    for told in measures(lines, "triton"):
        assert told["count"] >= 4
        assert told["failed"] == 0
        assert told["success_seconds"] >= told["compute_infer_seconds"] > 0
    for told in measures(lines, "stages"):
        assert {"ar_queue", "decode", "dit_queue", "denoise", "vae"} < set(told)


@pytest.mark.full
def test_own_load_with_its_own_server() -> None:
    lines = bench("--driver", "own", "--concurrency", "2")
    check_loads(lines, "own")
    assert [line["concurrency"] for line in measures(lines, "load")] == [2]
    peaks = {line["process"]: line["peak_bytes"] for line in measures(lines, "memory")}
    assert set(peaks) == {"tritonserver", "glm_ar", "glm_dit", "glm_control", "glm_image_stream"}
    # A stub holds torch at the least.
    assert min(peaks["glm_ar"], peaks["glm_dit"]) > 100e6


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_perf_analyzer_against_a_running_server(triton: TritonServer, protocol: str, tmp_path: Path) -> None:
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
    url = ["--url", triton.http_url, "--grpc-url", triton.grpc_url, "--protocol", protocol, "--input-data", str(data)]
    lines = bench(*url, "--driver", "perf_analyzer", "--concurrency", "1,2", "--request-rate", "4")
    check_loads(lines, "perf_analyzer")
    assert len(measures(lines, "load")) == 3
    assert [line["rate"] for line in measures(lines, "load") if "rate" in line] == [4]


def test_own_load_at_a_rate_tells_failures(triton: TritonServer, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    good = {"prompt": ["a"], "width": [32], "height": [32], "num_inference_steps": [1], "output_format": ["png"]}
    data.write_text(json.dumps({"data": [good, {**good, "width": [31]}]}))
    url = ["--url", triton.http_url, "--grpc-url", triton.grpc_url, "--input-data", str(data)]
    lines = bench(*url, "--driver", "own", "--concurrency", "", "--request-rate", "20", code=1)
    (told,) = measures(lines, "load")
    assert (told["rate"], told["failed"], told["errors"]) == (20, 2, ["width is 31; allowed: 32 to 2048"])


@pytest.mark.full
def test_stages_on_cards_of_their_own() -> None:
    brief = ["--size", "64x64", "--steps", "2", "--concurrency", "3", "--requests", "4"]
    lines = other_bench("cards.py", "painters", *brief)
    one, two = measures(lines, "glm_dit alone")
    assert [(told["painters"], told["requests"]) for told in (one, two)] == [(1, 4), (2, 8)]
    (told,) = measures(lines, "several painters")
    assert told["speedup"] == pytest.approx(two["pictures_per_second"] / one["pictures_per_second"], rel=1e-2)
    lines = other_bench("cards.py", "pipeline", *brief)
    (both,), (told,) = measures(lines, "both stages"), measures(lines, "pipelined")
    rates = {name: measures(lines, f"{name} alone")[0]["pictures_per_second"] for name in ("glm_ar", "glm_dit")}
    assert told["slower"] == min(rates, key=rates.__getitem__)
    assert told["to_slower"] == pytest.approx(both["pictures_per_second"] / min(rates.values()), rel=1e-2)


@pytest.mark.full
def test_a_server_against_the_planner() -> None:
    """Only that all is told: how near the simulation comes is for a quiet machine."""
    brief = ["--size", "64x64", "--steps", "2", "--alone", "4", "--busy", "20", "--requests", "20"]
    lines = other_bench("plan.py", *brief, "--dit", "cpu:1", "--admission", "gathered")
    (most,), (host,) = measures(lines, "most_a_second"), measures(lines, "host")
    assert most["ratio"] == pytest.approx(1, abs=0.02) or most["cores"] == 2
    assert host["cores_used"] > 0
    for name in ("p50_seconds", "p99_seconds", "images_per_second"):
        (told,) = measures(lines, name)
        assert told["ratio"] == pytest.approx(told["predicted"] / told["measured"], rel=1e-2)


@pytest.mark.full
def test_a_steady_stream_with_other_parameters() -> None:
    brief = ["--size", "64x64", "--steps", "2", "--concurrency", "3", "--requests", "4", "--warm-ups", "1"]
    parameters = ["--parameter", "glm_dit.quantization=int8", "--parameter", "glm_ar.admission=gathered"]
    lines = other_bench("stream.py", *brief, *parameters)
    (alone,), (told,) = measures(lines, "alone"), measures(lines, "steady stream")
    assert [line["number"] for line in measures(lines, "answered")] == [1, 2, 3, 4, 5]
    assert lines.index(alone) < lines.index(measures(lines, "answered")[0])
    assert (told["requests"], told["concurrency"], told["mps"]) == (4, 3, False)
    assert min(alone["ar_seconds"], alone["dit_seconds"], alone["vae_seconds"]) > 0
    assert told["pictures_per_second"] > 0
    assert told["to_bound"] == pytest.approx(told["pictures_per_second"] / told["bound_per_second"], rel=1e-2)


@pytest.mark.full
@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        ("bus.py", ["--requests", "3"], {"a step's reports, nobody listens"}),
        (
            "streaming.py",
            ["--size", "736x736", "--steps", "3", "--leave", "1", "--repeats", "1", "--requests", "2"],
            {"closed to free in denoise", "alone, pictures", "8 together, pictures"},
        ),
        (
            "previews.py",
            ["--load-format", "auto", "--size", "736x736", "--steps", "3"],
            {"a sketch, on the engine's thread", "a preview, alone", "a picture with a preview between its steps"},
        ),
        ("cancel.py", ["--load-format", "auto", "--size", "256x256"], {"cancel to free slot", "cancel to free device"}),
    ],
    ids=["bus", "streaming", "previews", "cancel"],
)
def test_what_it_costs_to_watch_and_to_cancel(
    tiny_checkpoint: Path, program: str, arguments: list[str], expected: set[str]
) -> None:
    checkpoint = [] if program == "bus.py" else ["--checkpoint", str(tiny_checkpoint)]
    command = [sys.executable, str(PROGRAM.with_name(program)), *checkpoint, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = {line["measure"]: line for line in map(json.loads, ended.stdout.splitlines())}
    assert expected <= set(lines)
    if program == "streaming.py":
        assert {"throughput_loss", "p99_loss"} < set(lines["8 together, pictures"])
    if program == "previews.py":
        assert lines["a sketch, on the engine's thread"]["heard"] == 2

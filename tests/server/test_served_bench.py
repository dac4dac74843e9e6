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
    command = [sys.executable, str(PROGRAM), *BRIEF, *arguments]
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
def test_a_steady_stream_with_other_parameters() -> None:
    program = PROGRAM.with_name("stream.py")
    brief = ["--size", "64x64", "--steps", "2", "--concurrency", "3", "--requests", "4", "--warm-ups", "1"]
    parameters = ["--parameter", "glm_dit.quantization=int8", "--parameter", "glm_ar.admission=gathered"]
    ended = subprocess.run(
        [sys.executable, str(program), *brief, *parameters],
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
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

"""The capacity planner: measured times, estimates of the profiles, a recommendation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capacity_planner import cli, planner
from capacity_planner.times import H100, StageTimes, image_tokens, read_measured, read_size
from glm_image.errors import ConfigurationError
from glm_image.parallel.layout import ParallelLayout
from glm_image.request.geometry import Size

REPOSITORY = Path(__file__).resolve().parents[2]
SQUARE, WIDE = Size(1024, 1024), Size(1024, 1920)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert cli.main([*arguments, "--json", "--requests", "200"]) == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def profiles(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["profile"]: row for row in report["profiles"]}


def lines(path: Path, *measures: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, measures)))
    return path


def test_eight_cards_get_one_ar_and_seven_dit_instances(capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(capsys, "--devices", "8", "--memory", "80", "--kind", "cuda")
    assert report["recommended"] == "cuda-8"
    found = profiles(report)
    # Each of the seven DiT instances takes 9.65 s an image, and the AR instance keeps up with them.
    assert found["cuda-8"]["images_per_second"] == pytest.approx(7 / 9.65, rel=0.05)
    assert found["cuda-2"]["images_per_second"] == pytest.approx(1 / 9.65, rel=0.05)
    assert found["cuda-1x80g"]["images_per_second"] < found["cuda-2"]["images_per_second"]
    assert found["cuda-8"]["first_stage_feeds"] > 7
    # Decoding over four cards by Amdahl's law from two; denoising by the measured speedups of cfg=2 and ulysses=2; and
    # the phases that no card shares: prefill, conditioning, the VAE, overhead.
    expected = 8.1 * (0.205 + 0.795 / 4) + 9.41 / 1.91 / 1.78 + 0.034 + 0.05 + 0.19 + 0.05
    assert found["cuda-8-latency"]["seconds"] == pytest.approx(expected, rel=0.05)
    # A single request through Triton: measured 18.19 s.
    assert found["cuda-2"]["seconds"] == pytest.approx(18.19, rel=0.05)
    p50, p99 = ([load[name] for load in report["loads"]] for name in ("p50", "p99"))
    assert p50 == sorted(p50)
    assert all(low <= high for low, high in zip(p50, p99, strict=True))


def test_npus_get_predicted_times(capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(capsys, "--devices", "2", "--memory", "64", "--kind", "npu")
    assert "no NPU has been measured" in report["note"]
    assert "modelled" in report["times"]
    assert profiles(report)["npu-2"]["images_per_second"] == pytest.approx(1 / 28.8, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "recommended", "refused"),
    [
        ("--devices 1 --memory 32", "npu-1x32g", {"npu-1x64g": "needs cards of 62 GB", "npu-2": "needs 2 cards"}),
        ("--devices 1 --memory 64", "npu-1x64g", {"npu-8": "needs 8 cards"}),
        ("--devices 2 --memory 80 --kind cuda", "cuda-2", {"cuda-8": "needs 8 cards"}),
        ("--devices 8 --memory 16", "", {"npu-8": "needs cards of 28 GB"}),
        ("--devices 8 --memory 32 --size 2048x2048", "", {"npu-8": "needs cards of 44 GB"}),
    ],
)
def test_profiles_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: str, recommended: str, refused: dict[str, str]
) -> None:
    report = planned(capsys, *arguments.split(), code=0 if recommended else 1)
    assert report["recommended"] == recommended
    found = profiles(report)
    assert {name: found[name]["refusal"] for name in refused} == refused


def test_the_text_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--devices", "2", "--memory", "80", "--kind", "cuda", "--requests", "100"]) == 0
    text = capsys.readouterr().out
    assert "recommended: cuda-2; latency with random arrivals:" in text
    assert "cuda-8               8       24.6  needs 8 cards" in text
    assert cli.main(["--devices", "1", "--memory", "8"]) == 1
    assert "no profile fits this machine" in capsys.readouterr().out


def test_the_script_runs_in_the_active_environment(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = subprocess.run(
        [REPOSITORY / "scripts" / "plan", "--devices", "1", "--memory", "8", "--json"],
        cwd=tmp_path,
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, json.loads(ran.stdout)["recommended"]) == (1, ""), ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--devices 0 --memory 64", "--devices is 0; allowed: 1 or more"),
        ("--devices 1 --memory 64 --size big", "size is big; allowed: WIDTHxHEIGHT"),
        ("--devices 1 --memory 64 --steps 0", "--steps is 0; allowed: 1 or more"),
        (
            "--devices 1 --memory 64 --measured /no/such/file",
            "/no/such/file: no JSON lines or result file of a benchmark",
        ),
    ],
)
def test_a_refused_flag_is_named(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert cli.main(arguments.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_measured_times_replace_the_defaults(tmp_path: Path) -> None:
    ar = lines(
        tmp_path / "ar.json",
        {"measure": "ceiling", "device": "x"},
        {"measure": "decode step", "size": 1024, "running": 1, "ms": 10.0},
        {"measure": "decode step", "size": 1024, "running": 8, "ms": 17.0},
        {"measure": "decode step", "size": 2048, "running": 8, "ms": 99.0},
        {"measure": "admission of a 64-token prompt", "lost_ms": 50.0},
    )
    dit = lines(
        tmp_path / "dit.json",
        {
            "measure": "picture, 50 steps, guidance 1.5",
            "size": "1920x1024",
            "denoise_seconds": 30.0,
            "vae_seconds": 0.375,
            "condition_seconds": 0.1,
        },
    )
    times = read_measured([ar])
    assert [times.step(1), times.step(4), times.step(8)] == pytest.approx([0.010, 0.013, 0.017])
    assert (times.prefill, times.denoise) == (0.05, H100.denoise)
    assert times.source == f"{ar}; the rest: {H100.source}"
    times = read_measured([ar, dit])
    assert times.denoise_step(WIDE) == pytest.approx(0.6)
    assert times.pixels(times.vae, WIDE) == pytest.approx(0.375)
    assert times.source == f"{ar}, {dit}; the rest: {H100.source}"  # the scaling


def test_measured_speedups_replace_the_scaling(tmp_path: Path) -> None:
    split = {"measure": "denoising step", "devices": 4, "parallel": "tp=4", "size": "1024x1024", "ms": 50.0}
    measured = lines(
        tmp_path / "parallel.json",
        {"measure": "decode step", "devices": 1, "running": 8, "ms": 6.0},
        {"measure": "decode step", "devices": 2, "through": "memory of the peers", "ms": 4.0, "speedup": 1.5},
        {"measure": "decode step", "devices": 2, "through": "collectives", "ms": 5.0, "speedup": 1.2},
        {**split, "devices": 1, "parallel": "none", "speedup": 1.0},
        {**split, "speedup": 3.2},
        {**split, "parallel": "cfg=2,ulysses=2", "speedup": 3.3},
        {**split, "size": "2048x2048", "speedup": 3.6},
    )
    scaling = read_measured([measured]).scaling
    assert scaling.decode_step(2) == pytest.approx(1 / 1.5)
    assert scaling.denoise_step(ParallelLayout(tp=4)) == pytest.approx(1 / 3.2)
    assert scaling.denoise_step(ParallelLayout(tp=4, cfg=2)) == pytest.approx(1 / 3.2 / 1.91)
    assert scaling.ulysses == H100.scaling.ulysses
    assert scaling.decode_step(1) == scaling.denoise_step(ParallelLayout()) == 1.0


def test_a_served_benchmark_has_the_times_of_both_stages(tmp_path: Path) -> None:
    seconds = {"ar_queue": 0.0, "prefill": 0.1, "decode": 12.8, "dit_queue": 0.0}
    seconds |= {"condition": 0.2, "denoise": 20.0, "vae": 0.4, "encode": 0.3}
    alone = {"measure": "stages", "concurrency": 1, **seconds}
    crowd = {**alone, "concurrency": 8, "denoise": 99.0}
    times = read_measured(
        [lines(tmp_path / "a", {"measure": "request", "size": "1024x1024", "steps": 40}, alone, crowd)]
    )
    assert times.step_one == pytest.approx(12.8 / (image_tokens(SQUARE) - 1))
    assert times.denoise_step(SQUARE) == pytest.approx(0.5)
    assert (times.prefill, times.condition, times.vae, times.encode) == (0.1, 0.2, 0.4, 0.3)
    with pytest.raises(ConfigurationError, match="no line has the time of a stage"):
        read_measured([lines(tmp_path / "b", alone)])  # without the request


def test_other_sizes_are_scaled_by_operations() -> None:
    """From 1024 x 1024 alone, 1920 x 1024 is within 5 % of the measurement."""
    square = StageTimes("x", 1.0, 1.0, 0.0, {SQUARE: H100.denoise[SQUARE]}, 0.0, 0.0)
    assert square.denoise_step(WIDE) == pytest.approx(H100.denoise[WIDE], rel=0.05)
    assert image_tokens(SQUARE) == 1280
    assert read_size("1920x1024") == WIDE


def test_int8_decodes_as_fast_as_measured() -> None:
    costs = {
        name: planner.stage_costs(planner.PROFILES[name], planner.Workload(SQUARE, 50), H100)
        for name in ("npu-1x32g", "npu-1x64g")
    }
    assert costs["npu-1x32g"].step(1) == pytest.approx(costs["npu-1x64g"].step(1) * 0.69)

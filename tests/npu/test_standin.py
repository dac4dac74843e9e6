"""The NPU path, executed on the published torch_npu over a stand-in for CANN: see ``scripts/npu_standin``.

The cases run in processes of their own, since torch_npu must be imported there with the stand-in's libraries.
"""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from capacity_planner import times

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SECONDS = 600


def python(npu: dict[str, str]) -> str:
    return f"{npu['VIRTUAL_ENV']}/bin/python"


def run(npu: dict[str, str], *command: object, mib: int | None = None) -> str:
    """Runs a Python program on the stand-in; returns what it prints."""
    variables = npu | ({"CANN_STANDIN_MIB": str(mib)} if mib else {})
    done = subprocess.run(
        [python(npu), *map(str, command)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def cases(npu: dict[str, str], *names: str, select: str = "", mib: int | None = None) -> None:
    paths = [FOLDER / "cases" / f"{name}.py" for name in names]
    options = ["-o", f"pythonpath={FOLDER / 'cases'}", "-p", "no:cacheprovider", "--capture=sys", "--noconftest"]
    run(npu, "-m", "pytest", *options, *(["-k", select] if select else []), *paths, mib=mib)


def test_operators(npu: dict[str, str]) -> None:
    cases(npu, "operators")


def test_streams_captures_and_memory(npu: dict[str, str]) -> None:
    cases(npu, "streams", mib=256)


def test_ranks(npu: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python(npu), str(FOLDER / "cases" / "ranks.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port)], env=npu, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-6000:]


def test_both_stages_in_bf16(npu: dict[str, str]) -> None:
    cases(npu, "product", select="bfloat16-none")


@pytest.mark.full
def test_both_stages_in_fp32_and_int8(npu: dict[str, str]) -> None:
    cases(npu, "product", select="float32 or int8")


def counted(npu: dict[str, str], *flags: str) -> dict[str, dict[str, Any]]:
    """Counts the launches of both stages; returns the measures by their names."""
    output = run(npu, ROOT / "scripts" / "bench" / "launches.py", *flags)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["measure"]: line for line in lines}


def check_launches(measures: dict[str, dict[str, Any]], decode_layer: int) -> None:
    decode, layers = measures["decode"], 40
    assert decode["launches_a_layer"] * layers + decode["launches_outside"] <= decode_layer * layers + 25
    assert measures["prefill"]["launches_a_layer"] <= decode_layer + 2
    assert measures["denoise"]["launches_a_layer"] <= 30  # both branches of guidance
    assert measures["denoise"]["launches_outside"] <= 45
    for step in ("decode", "denoising"):
        replay = measures[f"replay of the {step} step"]
        assert (replay["launches"], replay["host_waits"], replay["host_copies"], replay["allocations"]) == (1, 0, 0, 0)


def test_launches(npu: dict[str, str]) -> None:
    check_launches(counted(npu), 14)


@pytest.mark.full
def test_launches_in_int8(npu: dict[str, str]) -> None:
    check_launches(counted(npu, "--quantization", "int8"), 15)


@pytest.mark.full
def test_planned_times_are_those_of_the_model(npu: dict[str, str], tmp_path: Path) -> None:
    make = [ROOT / "scripts" / "make_tiny_checkpoint.py", tmp_path / "full", "--preset", "full", "--weights", "none"]
    run(npu, *make)
    output = run(npu, ROOT / "scripts" / "bench" / "npu_model.py", "--checkpoint", tmp_path / "full")
    lines = tmp_path / "lines"
    lines.write_text("".join(f"{line}\n" for line in output.splitlines() if line.startswith("{")))
    modelled, planned = times.read_measured([lines]), times.ASCEND_910B3
    for name in ("step_one", "step_full", "prefill", "vae"):
        assert getattr(planned, name) == pytest.approx(getattr(modelled, name), rel=0.02)
    assert planned.denoise == pytest.approx(modelled.denoise, rel=0.02)
    assert planned.scaling.cfg == pytest.approx(modelled.scaling.cfg, abs=0.02)

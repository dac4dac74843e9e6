"""The NPU path, executed on the published torch_npu over a stand-in for CANN: see ``scripts/npu_standin``.

The cases run in processes of their own, since torch_npu must be imported there with the stand-in's libraries.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SECONDS = 600


def load_environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("npu_environment", FOLDER / "standin" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def npu() -> dict[str, str]:
    """The variables of a process that sees two NPUs."""
    try:
        return dict(load_environment().standin_environment(devices=2))
    except RuntimeError as error:  # no compiler, or torch_npu is not to be had
        pytest.skip(str(error))


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


@pytest.mark.full
@pytest.mark.parametrize("profile", ["npu-1x64g", "npu-1x32g"])
def test_served_image(npu: dict[str, str], tmp_path: Path, profile: str) -> None:
    """A profile in bf16 and one in int8: one request, twice."""
    flags = ["--checkpoint", "checkpoints/tiny", "--profile", profile]
    ports = [flag for kind in ("http", "grpc", "metrics") for flag in (f"--{kind}-port", "0")]
    command = [python(npu), "-m", "glm_image.supervisor", *flags, *ports]
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, env=npu, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            assert ready.startswith("ready: "), log.read_text()[-6000:]
            answers = [generated(ready.split()[1]) for _ in range(2)]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(SECONDS)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images_base64"])))) for answer in answers]
    assert images[0].shape == (64, 64, 3)
    assert images[0].std() > 0.5  # mostly white
    assert np.array_equal(*images)
    assert "found npu:0 to npu:1" in log.read_text()


def generated(url: str) -> dict[str, str]:
    body = {"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 10, "seed": 3}
    request = urllib.request.Request(
        f"{url}/v2/models/glm_image/generate",
        json.dumps(body | {"output_format": "png"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return dict(json.load(answer))


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

"""Profiles served for real, on CPU "cards": what names an NPU or a GPU names the CPU of that number."""

from __future__ import annotations

import re
import shutil
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from glm_image.config.profiles import PROFILES
from glm_image.config.schema import DIT_PARAMETERS
from glm_image.supervisor import ServerSettings, ServerStartError, TritonServer
from server.kserve import at_once, grpc_infer

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
IMAGES = re.compile(r'^glm_image_dit_images_total\{instance="(\d+)",.*\} (\d+)', re.MULTILINE)

# In the normal run one profile; the others differ from it in the number of processes and the names of devices.
FEW = ("npu-2",)
MANY = tuple(name for name in PROFILES if name not in FEW)
ALLOWED = {spec.name: spec.allowed for spec in DIT_PARAMETERS}


def on_cpu_cards(folder: Path) -> Path:
    repository = shutil.copytree(REPOSITORY, folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for config in repository.glob("*/configs/*.pbtxt"):
        config.write_text(re.sub(r"\b(npu|cuda):(\d+)", r"cpu:\2", config.read_text()))
    return repository


def images_by_painter(server: TritonServer) -> dict[int, int]:
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=30) as answer:
        return {int(index): int(count) for index, count in IMAGES.findall(answer.read().decode())}


def expected_refusal(name: str) -> str | None:
    """In what words a profile is refused that needs what this version lacks."""
    profile = PROFILES[name]
    if profile.dit.parameters.get("quantization", "none") not in ALLOWED["quantization"]:
        return "quantization is 'int8'; allowed: "
    return None


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.full) for name in MANY)])
def test_a_profile_is_served(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = TritonServer(
        ServerSettings(tiny_checkpoint, model_repository=on_cpu_cards(tmp_path), profile=name, drain_seconds=5)
    )
    if refusal := expected_refusal(name):
        with pytest.raises(ServerStartError, match=refusal):
            server.__enter__()
        return
    painters = len(PROFILES[name].dit.entries)
    asked = {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 30 if painters > 1 else 1}
    with server:
        # More at once than there are painters: a request goes to one that is free, so each gets some.
        count = 4 * painters if painters > 1 else 1
        burst = at_once([partial(grpc_infer, server, {**asked, "seed": seed}) for seed in range(count)])
        assert [outputs["images"].shape for outputs in burst.outputs] == [(1, 64, 64, 3)] * count
        painted = images_by_painter(server)
        assert set(painted) == set(range(painters))
        assert sum(painted.values()) == count
        assert min(painted.values()) > 0

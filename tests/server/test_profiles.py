"""Profiles served on CPU devices, which replace the NPUs and GPUs of the same index.

In the normal run ``test_placement`` serves one of them.
"""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from glm_image.config.profiles import PROFILES
from glm_image.supervisor import ServerSettings, TritonServer
from server.kserve import at_once, grpc_infer
from server.test_metrics import page_when

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
IMAGES = "glm_image_dit_images_total"


def on_cpu_cards(folder: Path) -> Path:
    repository = shutil.copytree(REPOSITORY, folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for config in repository.glob("*/configs/*.pbtxt"):
        config.write_text(re.sub(r"\b(npu|cuda):(\d+)", r"cpu:\2", config.read_text()))
    return repository


def images_by_instance(server: TritonServer, total: int) -> dict[int, int]:
    """Waits until ``total`` images are counted; returns the number of each instance."""
    page = page_when(server, lambda page: sum(count for _, count in page.samples[IMAGES]) >= total)
    return {int(labels["instance"]): int(count) for labels, count in page.samples[IMAGES]}


def check_instances(server: TritonServer, name: str) -> None:
    """Every DiT instance of a profile renders some of the images."""
    instances = len(PROFILES[name].dit.entries)
    values = {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 30 if instances > 1 else 1}
    # More requests than instances: Triton gives a request to a free instance, so each instance gets some.
    count = 4 * instances if instances > 1 else 1
    burst = at_once([partial(grpc_infer, server, {**values, "seed": seed}) for seed in range(count)])
    assert [outputs["images"].shape for outputs in burst.outputs] == [(1, 64, 64, 3)] * count
    rendered = images_by_instance(server, count)
    assert set(rendered) == set(range(instances))
    assert sum(rendered.values()) == count
    assert min(rendered.values()) > 0


@pytest.mark.full
@pytest.mark.parametrize("name", PROFILES)
def test_profile_is_served(tiny_checkpoint: Path, same_threads: None, tmp_path: Path, name: str) -> None:
    settings = ServerSettings(tiny_checkpoint, model_repository=on_cpu_cards(tmp_path), profile=name, drain_seconds=5)
    with TritonServer(settings) as server:
        check_instances(server, name)

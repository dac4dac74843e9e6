"""Profiles served on CPU devices, which replace the NPUs and GPUs of the same index."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from glm_image.config.profiles import PROFILES
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image_client import GlmImageClient
from server.kserve import at_once, grpc_infer
from server.streaming import http_stream, texts
from server.test_metrics import page_when

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
IMAGES = "glm_image_dit_images_total"

# In the normal run one profile; the others differ from it in the number of processes and the names of devices.
PROFILE = "npu-2"
OTHERS = tuple(name for name in PROFILES if name != PROFILE)


def on_cpu_cards(folder: Path) -> Path:
    repository = shutil.copytree(REPOSITORY, folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for config in repository.glob("*/configs/*.pbtxt"):
        config.write_text(re.sub(r"\b(npu|cuda):(\d+)", r"cpu:\2", config.read_text()))
    return repository


def images_by_instance(server: TritonServer, total: int) -> dict[int, int]:
    """Waits until ``total`` images are counted; returns the number of each instance."""
    page = page_when(server, lambda page: sum(count for _, count in page.samples[IMAGES]) >= total)
    return {int(labels["instance"]): int(count) for labels, count in page.samples[IMAGES]}


def profile_server(checkpoint: Path, folder: Path, name: str, drain_seconds: int = 5) -> TritonServer:
    settings = ServerSettings(
        checkpoint, model_repository=on_cpu_cards(folder), profile=name, drain_seconds=drain_seconds
    )
    return TritonServer(settings)


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
@pytest.mark.parametrize("name", OTHERS)
def test_profile_is_served(tiny_checkpoint: Path, same_threads: None, tmp_path: Path, name: str) -> None:
    with profile_server(tiny_checkpoint, tmp_path, name) as server:
        check_instances(server, name)


def test_profile_is_served_and_open_streams_are_drained(
    tiny_checkpoint: Path, same_threads: None, tmp_path: Path
) -> None:
    """The server ends by itself, with nothing of the streams left."""
    with profile_server(tiny_checkpoint, tmp_path, PROFILE, drain_seconds=30) as server:
        check_instances(server, PROFILE)
        with GlmImageClient(f"grpc://{server.grpc_url}") as client:
            values = {"prompt": "a fox", "height": 64, "width": 96, "num_inference_steps": 30, "output_format": "png"}
            over_sse, by_client = http_stream(server, values), client.stream(**values)
            assert [next(over_sse).event["event"], next(by_client).kind] == ["queued", "queued"]
            server.request_stop()
            (*_, last), (*_, end) = at_once([partial(list, over_sse), partial(list, by_client)]).outputs
            assert texts(last, "images_base64")
            assert end.result is not None
        assert server.wait() == 0
        _, _, stopping = server.log_tail.partition("Signal (15) received")
        assert re.findall(r"Found (\d+) live models", stopping) == ["0"], (
            "Triton must be stopped when no model is left to unload"
        )

"""The served product on the stand-in for CANN: profiles, streams, cancels, edits, faults, several devices."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_image_client import GlmImageClient
from glm_image_client.errors import GlmImageClientError, RequestCancelled, ServerFailure
from helpers import wait_until
from npu.serving import Served, serving
from server.served import descendants, wait_gone
from server.test_placement import copy_repository, edit, set_parameter

pytestmark = pytest.mark.full

OPTIONS: dict[str, Any] = {"width": 96, "height": 64, "num_inference_steps": 10, "seed": 3, "output_format": "raw"}
PROMPT = "a red circle that says 'NEWS'"
SECONDS = 600


def generated(server: Served, prompt: str = PROMPT, **options: Any) -> NDArray[np.uint8]:
    with GlmImageClient(server.grpc, timeout=SECONDS) as client:
        pixels = client.generate(prompt, **{**OPTIONS, **options}).pixels
    assert pixels is not None
    return pixels


MODELS = ("glm_image", "glm_ar", "glm_dit", "glm_control", "glm_image_stream")


def repository(folder: Path) -> Path:
    """Returns a model repository whose DiT denoises nothing at load: a large image takes the stand-in minutes."""
    copied = copy_repository(folder / "models", *MODELS)
    for config in (copied / "glm_dit").rglob("*.pbtxt"):
        text = config.read_text()
        changed = text.replace(
            '"warmup_sizes" value { string_value: "auto" }', '"warmup_sizes" value { string_value: "64x64" }'
        )
        assert changed != text
        config.write_text(changed)
    return copied


@pytest.mark.parametrize("profile", ["npu-1x64g", "npu-1x32g"])
def test_one_card(npu: dict[str, str], tmp_path: Path, profile: str) -> None:
    """A profile in bf16 and one in int8: one request, twice."""
    with serving(npu, tmp_path / "log", "--profile", profile, "--model-repository", repository(tmp_path)) as server:
        images = [generated(server) for _ in range(2)]
        assert "found npu:0 to npu:1" in server.log
    assert images[0].std() > 0.5  # mostly white
    assert np.array_equal(*images)


@pytest.fixture(scope="module")
def two(npu: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A card for each stage."""
    folder = tmp_path_factory.mktemp("two")
    with serving(npu, folder / "log", "--profile", "npu-2", "--model-repository", repository(folder)) as server:
        yield server


def test_image_to_image(two: Served) -> None:
    source = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    images = [generated(two, images=[source]) for _ in range(2)]
    assert np.array_equal(*images)
    assert not np.array_equal(images[0], generated(two))


def test_stream_with_previews(two: Served) -> None:
    with GlmImageClient(two.grpc, timeout=SECONDS) as client:
        events = list(client.stream(PROMPT, **OPTIONS, preview_steps=4, preview_every=3))
    kinds = {event.kind for event in events}
    assert kinds >= {"decode", "denoise", "image"}
    assert any(event.kind == "denoise" and event.images for event in events)
    assert np.array_equal(events[-1].result.pixels, generated(two))


def test_cancel(two: Served) -> None:
    with GlmImageClient(two.grpc, timeout=SECONDS) as client:
        stream = client.stream(PROMPT, **{**OPTIONS, "num_inference_steps": 200}, request_id="mine", preview_every=1)
        next(event for event in stream if event.kind == "denoise")
        client.cancel("mine")
        with pytest.raises(RequestCancelled):
            list(stream)
    assert generated(two).any()


def test_killed_stub(two: Served) -> None:
    before = generated(two)
    stubs = [pid for pid in descendants(two.process.pid) if "stub" in Path(f"/proc/{pid}/cmdline").read_text()]
    victim = next(pid for pid in stubs if "glm_dit" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(victim, signal.SIGKILL)
    wait_gone(victim)

    def answers() -> list[NDArray[np.uint8]]:
        try:
            return [generated(two)]
        except GlmImageClientError:
            return []

    (after,) = wait_until(answers, SECONDS)
    assert np.array_equal(before, after)


def test_two_instances_with_cached_denoising(npu: dict[str, str], tmp_path: Path) -> None:
    models = repository(tmp_path)
    edit(models, "glm_dit", "count: 1", "count: 2")
    set_parameter(models, "glm_ar", "devices", "npu:0")
    set_parameter(models, "glm_dit", "devices", "npu:0;npu:1")
    set_parameter(models, "glm_dit", "cache", "cache_dit")
    set_parameter(models, "glm_dit", "cache_residual_diff_threshold", "1")
    share = "0.4"
    for model in ("glm_ar", "glm_dit"):
        set_parameter(models, model, "memory_utilization", share)
    options = {**OPTIONS, "num_inference_steps": 16}
    with (
        serving(npu, tmp_path / "log", "--model-repository", models) as server,
        GlmImageClient(server.grpc, timeout=SECONDS) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        results = list(threads.map(lambda _: client.generate(PROMPT, **options), range(4)))
    assert {tuple(result.metadata.cached_steps) for result in results} == {(9,)}
    for result in results[1:]:
        assert np.array_equal(result.pixels, results[0].pixels)


@pytest.mark.parametrize("parallel", ["cfg=2", "tp=2", "ulysses=2"])
def test_stages_over_two_devices(
    npus: Callable[[int], dict[str, str]], two: Served, tmp_path: Path, parallel: str
) -> None:
    models = repository(tmp_path)
    set_parameter(models, "glm_ar", "devices", "npu:0,npu:1")
    set_parameter(models, "glm_dit", "devices", "npu:2,npu:3")
    set_parameter(models, "glm_dit", "parallel", parallel)
    with serving(npus(4), tmp_path / "log", "--model-repository", models) as server:
        images = [generated(server) for _ in range(2)]
    assert np.array_equal(*images)
    single = generated(two).astype(int)
    assert np.abs(images[0] - single).mean() < 2


def test_out_of_memory(npu: dict[str, str], tmp_path: Path) -> None:
    """A large image does not fit; its request gets an error that says so, and the next one its image."""
    models = repository(tmp_path)
    set_parameter(models, "glm_ar", "devices", "npu:0")
    set_parameter(models, "glm_dit", "devices", "npu:1")
    set_parameter(models, "glm_dit", "vae_tiling", "off")
    set_parameter(models, "glm_ar", "max_sequence_tokens", "1024")
    set_parameter(models, "glm_ar", "max_num_seqs", "2")
    with serving(npu, tmp_path / "log", "--model-repository", models, CANN_STANDIN_MIB="120") as server:
        with GlmImageClient(server.grpc, timeout=SECONDS) as client:
            prior = client.prior_tokens(PROMPT, width=64, height=64, seed=3)
            side = 20
            large = replace(
                prior,
                prior_token_ids=np.zeros((1, side * side), dtype=np.int32),
                prior_grid=np.full(2, side, dtype=np.int32),
                resolved_size=np.full(2, 32 * side, dtype=np.int32),
            )
            with pytest.raises(ServerFailure, match=r"memory"):
                client.paint(PROMPT, large, num_inference_steps=1, output_format="raw")
        assert generated(server).any()

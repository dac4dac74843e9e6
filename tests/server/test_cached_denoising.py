"""Cached denoising behind Triton: switched on in ``config.pbtxt``, several sizes concurrently on two instances."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from glm_image.dit.cache import CacheSettings
from glm_image.dit.settings import DitSettings
from glm_image.pipeline import LocalPipeline, LocalSettings
from glm_image.request.parameters import GenerationParameters
from glm_image.supervisor import ServerSettings, ServerStartError, TritonServer
from server.kserve import KServeError, Values, at_once, grpc_infer, metadata
from server.test_metrics import Page, page_when
from server.test_placement import copy_repository, edit, set_parameter

pytestmark = pytest.mark.full

STEPS = 16
REQUEST: Values = {"prompt": "A fox reading 'NEWS'", "num_inference_steps": STEPS}
REQUESTS: list[Values] = [
    {**REQUEST, "height": 64, "width": 96, "seed": 1},
    {**REQUEST, "height": 96, "width": 32, "seed": 2, "num_images": 2},
    {**REQUEST, "height": 64, "width": 64, "seed": 3, "guidance_scale": 1.0},
    {**REQUEST, "height": 128, "width": 64, "seed": 4},
]
SKIPPED = 9
"""Of 16 steps the first 4 are computed, and then each that follows three skipped ones."""


def total(page: Page, name: str) -> float:
    """A counter of all instances."""
    return sum(value for _, value in page.samples[f"glm_image_dit_{name}_total"])


def test_concurrent_images_equal_the_local_ones(tiny_checkpoint: Path, same_threads: None, tmp_path: Path) -> None:
    repository = copy_repository(tmp_path / "models", "glm_image", "glm_ar", "glm_dit")
    edit(repository, "glm_dit", "count: 1", "count: 2")
    set_parameter(repository, "glm_dit", "devices", "cpu;cpu")
    set_parameter(repository, "glm_dit", "cache", "cache_dit")
    set_parameter(repository, "glm_dit", "cache_residual_diff_threshold", "1")
    set_parameter(repository, "glm_dit", "cache_enable_taylorseer", "true")
    settings = CacheSettings(residual_diff_threshold=1.0, enable_taylorseer=True)
    with (
        LocalPipeline(tiny_checkpoint, "cpu", LocalSettings(dit=DitSettings(cache=settings))) as local,
        TritonServer(ServerSettings(tiny_checkpoint, model_repository=repository, drain_seconds=5)) as server,
    ):
        expected = [local.generate(GenerationParameters(**values)) for values in REQUESTS]
        prior = grpc_infer(server, {**REQUEST, "height": 512, "width": 512, "seed": 5}, "glm_ar")
        late = {"prompt": "x", **prior, "num_inference_steps": 200}
        # Stopped during the denoising, or before it: the time of its first steps may show that it would be late.
        with pytest.raises(KServeError, match=r"past its deadline|cannot meet its deadline"):
            grpc_infer(server, late, "glm_dit", timeout_seconds=0.3)
        outputs = at_once([partial(grpc_infer, server, values) for values in REQUESTS * 2]).outputs
        for answer, picture in zip(outputs, expected * 2, strict=True):
            assert np.array_equal(answer["images"], picture.pixels)
            assert metadata(answer)["cached_steps"] == [SKIPPED] * len(picture.pixels)
        images = 2 * sum(len(picture.pixels) for picture in expected)
        page = page_when(server, lambda page: total(page, "images") == images)
        assert images * SKIPPED <= total(page, "cached_steps") < (images + 1) * SKIPPED + 200


def test_too_many_compute_blocks_are_refused_at_the_start(tiny_checkpoint: Path, tmp_path: Path) -> None:
    repository = copy_repository(tmp_path, "glm_dit")
    set_parameter(repository, "glm_dit", "cache", "cache_dit")
    set_parameter(repository, "glm_dit", "cache_Fn_compute_blocks", "2")
    with pytest.raises(ServerStartError, match=r"glm_dit failed to load: cache_Fn_compute_blocks .* allowed: fewer"):
        TritonServer(ServerSettings(tiny_checkpoint, model_repository=repository)).__enter__()

"""The steps skipped are those that cache-dit skips on the reference, and the images are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cache_dit
import numpy as np
import pytest
import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig
from cache_dit.caching.cache_contexts import CachedContext
from diffusers import GlmImagePipeline
from numpy.typing import NDArray

from glm_image.ar.settings import ArSettings
from glm_image.dit import cached_step
from glm_image.dit.cache import CacheSettings
from glm_image.dit.cache_policy import ReusePolicy
from glm_image.pipeline import GeneratedImages, LocalPipeline, LocalSettings, paint_request
from glm_image.request.parameters import GenerationParameters
from helpers import MakeCheckpoint
from parity.reference import load_reference, reference_image, reference_tokens
from pictures import encoded, picture

BLOCKS = 6
HEIGHT, WIDTH, SEED = 64, 64, 3
PROMPT = "a 'cat'"
SOME = 0.7
"""A threshold that the changes of some steps of random weights are below, and of some are not."""

Pattern = list[tuple[bool, ...]]
"""For each step, which branches skipped."""


@dataclass(frozen=True)
class Case:
    settings: CacheSettings
    steps: int = 16
    guidance: float = 1.5
    sources: tuple[tuple[int, int], ...] = ()
    skips: range = field(default=range(1, 100))
    """Skipped steps of both branches together; a case that skips nothing would test nothing."""


USUAL = CacheSettings(residual_diff_threshold=SOME)
ALWAYS = CacheSettings(residual_diff_threshold=1e9)

CASES = {
    "the guide's threshold": Case(CacheSettings(), skips=range(1)),
    "some": Case(USUAL),
    "no guidance": Case(USUAL, guidance=1.0),
    "whenever it may": Case(ALWAYS, steps=50, skips=range(70, 71)),
    "two blocks in front, one at the back": Case(replace(USUAL, Fn_compute_blocks=2, Bn_compute_blocks=1)),
    "all but one block": Case(replace(USUAL, Fn_compute_blocks=3, Bn_compute_blocks=2)),
    "no warm-up, no limit": Case(replace(USUAL, max_warmup_steps=0, max_continuous_cached_steps=-1)),
    "at most two": Case(replace(ALWAYS, max_cached_steps=2), skips=range(4, 5)),
    "TaylorSeer": Case(replace(ALWAYS, enable_taylorseer=True)),
    "TaylorSeer of order 2, blocks at the back": Case(
        replace(ALWAYS, enable_taylorseer=True, taylorseer_order=2, Bn_compute_blocks=2), steps=20
    ),
    "mask, dynamic": Case(replace(USUAL, scm_steps_mask_policy="medium", max_continuous_cached_steps=-1), steps=28),
    "mask, static": Case(replace(USUAL, scm_steps_mask_policy="ultra", scm_steps_policy="static"), steps=20),
    "refreshed between two steps": Case(replace(ALWAYS, force_refresh_step_hint=16)),
    "refreshed within a step": Case(replace(ALWAYS, force_refresh_step_hint=17)),
    "refreshed, no guidance": Case(replace(USUAL, force_refresh_step_hint=7), guidance=0.0),
    "a source": Case(replace(USUAL, force_refresh_step_hint=1), sources=((96, 64),)),
    "two sources": Case(replace(ALWAYS, force_refresh_step_hint=2, Bn_compute_blocks=1), 12, 1.5, ((64, 64), (64, 96))),
    "a source, no guidance": Case(replace(USUAL, force_refresh_step_hint=1), guidance=1.0, sources=((64, 64),)),
}


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(dit_layers=BLOCKS, source_min_pixels=64 * 64)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[LocalPipeline]:
    with LocalPipeline(folder, "cpu", LocalSettings(ar=ArSettings(max_sequence_tokens=2048))) as opened:
        yield opened


@pytest.fixture(scope="module")
def their_tokens(folder: Path) -> NDArray[np.int64]:
    return reference_tokens(load_reference(folder), PROMPT, HEIGHT, WIDTH, SEED)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """A separate reference, as cache-dit changes the transformer permanently."""
    pipe = GlmImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parameters(case: Case) -> GenerationParameters:
    return GenerationParameters(
        prompt=PROMPT,
        height=HEIGHT,
        width=WIDTH,
        seed=SEED,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        images=tuple(encoded(picture(*size)) for size in case.sources) or None,
    )


def paint(pipeline: LocalPipeline, case: Case) -> GeneratedImages:
    resolved = pipeline.resolve(parameters(case))
    return pipeline.paint(paint_request(resolved, pipeline.prior(resolved), {}))


def cached(pipeline: LocalPipeline, case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[GeneratedImages, Pattern]:
    """Renders with the cache, and records the decisions of each branch."""
    branches: list[list[bool]] = []

    class RecordedPolicy(ReusePolicy):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.decided: list[bool] = []
            branches.append(self.decided)

        def begin_step(self, change: Callable[[], float]) -> bool:
            self.decided.append(super().begin_step(change))
            return self.decided[-1]

    monkeypatch.setattr(cached_step, "ReusePolicy", RecordedPolicy)
    monkeypatch.setattr(pipeline.dit.executor, "cache", case.settings)
    painted = paint(pipeline, case)
    assert len(branches) == (2 if case.guidance > 1 else 1)
    return painted, list(zip(*branches, strict=True))


@contextmanager
def cache_dit_on(pipe: Any, case: Case) -> Iterator[None]:
    settings, mask = case.settings, case.settings.steps_mask(case.steps)
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=settings.taylorseer_order)
    cache_dit.enable_cache(
        pipe,
        cache_config=DBCacheConfig(
            Fn_compute_blocks=settings.Fn_compute_blocks,
            Bn_compute_blocks=settings.Bn_compute_blocks,
            max_warmup_steps=settings.max_warmup_steps,
            residual_diff_threshold=settings.residual_diff_threshold,
            max_continuous_cached_steps=settings.max_continuous_cached_steps,
            max_cached_steps=settings.max_cached_steps,
            steps_computation_mask=None if mask is None else list(mask),
            steps_computation_policy=settings.scm_steps_policy,
            force_refresh_step_hint=settings.force_refresh_step_hint,
            enable_separate_cfg=case.guidance > 1,
        ),
        calibrator_config=calibrator if settings.enable_taylorseer else None,
    )
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def their_picture(
    pipe: Any, tokens: NDArray[np.int64], case: Case, monkeypatch: pytest.MonkeyPatch
) -> tuple[NDArray[np.uint8], Pattern]:
    """Renders with cache-dit on the reference; a pass counts as skipped where cache-dit records it."""
    passes: list[bool] = []
    mark, add = CachedContext.mark_step_begin, CachedContext.add_cached_step

    def marked(context: CachedContext) -> None:
        passes.append(False)
        mark(context)

    def added(context: CachedContext) -> None:
        passes[-1] = True
        add(context)

    sources = [picture(*size) for size in case.sources]
    with cache_dit_on(pipe, case), monkeypatch.context() as patched:
        patched.setattr(CachedContext, "mark_step_begin", marked)
        patched.setattr(CachedContext, "add_cached_step", added)
        image = reference_image(
            pipe, PROMPT, HEIGHT, WIDTH, SEED, case.steps, case.guidance, None if sources else tokens, sources
        )
    assert not any(passes[: len(sources)])
    branches = 2 if case.guidance > 1 else 1
    steps = iter(passes[len(sources) :])
    return image, list(zip(*[steps] * branches, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_skipped_steps_and_pixels_are_those_of_cache_dit(
    ours: LocalPipeline, theirs: Any, their_tokens: NDArray[np.int64], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    painted, skipped = cached(ours, case, monkeypatch)
    image, their_skipped = their_picture(theirs, their_tokens, case, monkeypatch)
    assert skipped == their_skipped
    assert sum(map(sum, skipped)) in case.skips
    (pixels,) = painted.pixels
    assert int(np.abs(pixels.astype(int) - image).max()) == 0
    assert painted.metadata["cached_steps"] == [sum(map(all, skipped))]

"""Cached denoising: how much it skips, and that no image affects another."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImageTransformer2DModel

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.config.parameters import DitParameters
from glm_image.devices.open import open_device
from glm_image.dit.blocks import eager_blocks
from glm_image.dit.cache import CacheSettings, _steps_mask
from glm_image.dit.cached_step import DbCacheStep
from glm_image.dit.commands import Drop, Prepare, Step
from glm_image.dit.conditioning import Branch, Conditioning
from glm_image.dit.engine import DitEngine, DitResult, DitSettings
from glm_image.dit.metrics import CACHED_STEPS
from glm_image.dit.model import DitModel
from glm_image.dit.step import ImageState
from glm_image.errors import CancelledError, ConfigurationError
from glm_image.lifecycle.context import ProgressCallback, RequestContext
from glm_image.request.declaration import read
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest
from glm_image.telemetry.metrics import MetricSpec
from helpers import MakeCheckpoint
from pictures import encoded, picture

BLOCKS = 6
GRID = Grid(2, 3)
ALWAYS = CacheSettings(residual_diff_threshold=1e9)
SOME = CacheSettings(residual_diff_threshold=0.7)
NEVER = CacheSettings(residual_diff_threshold=0.0)
DISSIMILAR = CacheSettings(residual_diff_threshold=1e-9)
"""Reads the change in every step, and finds none small enough."""

MEAN_DIFFERENCE = 4
"""Of 255: three times the difference with random weights, which is no measure of the published ones."""


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(dit_layers=BLOCKS, source_min_pixels=64 * 64)


class Recorder:
    """Sums up the cached steps that an engine records."""

    def __init__(self) -> None:
        self.cached = 0.0

    def __call__(self, measure: MetricSpec, value: float, times: int = 1, /) -> None:
        self.cached += value if measure is CACHED_STEPS else 0


def load(folder: Path, cache: CacheSettings | None = None) -> DitEngine:
    return DitEngine(Checkpoint.open(folder), open_device("cpu"), DitSettings(cache=cache), Recorder())


@pytest.fixture(scope="module")
def engine(folder: Path) -> DitEngine:
    return load(folder)


@pytest.fixture
def cache(engine: DitEngine) -> Iterator[Any]:
    """Sets the cache of the engine's next images."""
    yield lambda settings: setattr(engine.executor, "cache", settings)
    engine.executor.cache = None


def request(grid: Grid = GRID, *seeds: int, **changed: Any) -> PaintRequest:
    values: dict[str, Any] = {
        "prompt": "a 'b'",
        "prior_token_ids": np.arange(grid.tokens * max(1, len(seeds)), dtype=np.int32).reshape(-1, grid.tokens),
        "grid": grid,
        "requested": Size(grid.height * 32, grid.width * 32),
        "seeds": seeds or (1,),
        "num_inference_steps": 16,
        "guidance_scale": 1.5,
    }
    return PaintRequest(**(values | changed))


def edit_request(**changed: Any) -> PaintRequest:
    """Returns a request with a source of 96 x 64 pixels."""
    tokens = np.arange(6, dtype=np.int32)
    source = {"images": (encoded(picture(96, 64)),), "source_token_ids": tokens, "source_grids": (GRID,)}
    return request(**source, **changed)


def paint(engine: DitEngine, paint_request: PaintRequest, context: RequestContext | None = None) -> DitResult:
    return engine.paint(context or RequestContext(), paint_request, Limits()).result()


@pytest.mark.parametrize(
    "settings", [NEVER, DISSIMILAR, replace(NEVER, Fn_compute_blocks=2, Bn_compute_blocks=2)], ids=str
)
@pytest.mark.parametrize(
    "paint_request",
    [request(), request(guidance_scale=1.0), edit_request(), edit_request(guidance_scale=0.0)],
    ids=["guidance", "no guidance", "a source", "a source, no guidance"],
)
def test_cache_that_skips_nothing_changes_no_bit(
    engine: DitEngine, cache: Any, settings: CacheSettings, paint_request: PaintRequest
) -> None:
    exact = paint(engine, paint_request)
    cache(settings)
    context = RequestContext()
    assert np.array_equal(paint(engine, paint_request, context).pixels, exact.pixels)
    assert context.cached_steps == [0]


def test_skipped_steps_run_fewer_blocks_and_change_the_image_little(
    engine: DitEngine, cache: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = 0
    blocks: Any = engine.executor._model.blocks
    run = blocks.run

    def counted(which: range, sequences: list[Any], *rest: Any) -> Any:
        nonlocal ran
        ran += len(which) * len(sequences)
        return run(which, sequences, *rest)

    monkeypatch.setattr(blocks, "run", counted)
    paint_request = request(num_inference_steps=50)
    exact = paint(engine, paint_request).pixels.astype(int)
    assert ran == 50 * BLOCKS * 2
    for settings, work in ((ALWAYS, 15 * BLOCKS + 35), (replace(ALWAYS, Bn_compute_blocks=2), 15 * BLOCKS + 35 * 3)):
        cache(settings)
        ran, context = 0, RequestContext()
        difference = np.abs(paint(engine, paint_request, context).pixels - exact)
        assert context.cached_steps == [35]
        assert ran == work * 2
        assert 0 < difference.mean() < MEAN_DIFFERENCE
        with capsys.disabled():
            print(f"\n{ran} of {50 * BLOCKS * 2} block calls: differs by {difference.mean():.2f} of 255 in the mean")


def test_cached_steps_of_each_image_are_reported_and_counted(folder: Path) -> None:
    engine = load(folder, SOME)
    context, alone = RequestContext(), [RequestContext(), RequestContext()]
    together = paint(engine, request(GRID, 5, 6), context).pixels
    for index, seed in enumerate((5, 6)):
        tokens = request(GRID, 5, 6).prior_token_ids[index : index + 1]
        painted = paint(engine, request(GRID, seed, prior_token_ids=tokens), alone[index])
        assert np.array_equal(painted.pixels[0], together[index])
    assert context.cached_steps == [count for one in alone for count in one.cached_steps]
    assert all(0 < count < 16 for count in context.cached_steps)
    assert isinstance(engine._record, Recorder)
    assert engine._record.cached == 2 * sum(context.cached_steps)


def test_images_in_flight_together_do_not_affect_each_other(folder: Path) -> None:
    """Two instances, which render images of several sizes at the same time, with and without a source and guidance."""
    requests = [request(), edit_request(guidance_scale=1.0), request(Grid(1, 1), 8, 9)]
    engines = [load(folder, SOME), load(folder, replace(SOME, enable_taylorseer=True))]
    alone = [[paint(engine, request).pixels for request in requests] for engine in engines]
    with ThreadPoolExecutor(4) as threads:
        again = [[threads.submit(paint, engine, request) for request in requests] for engine in engines]
        for engine_alone, engine_again in zip(alone, again, strict=True):
            for pixels, future in zip(engine_alone, engine_again, strict=True):
                assert np.array_equal(future.result().pixels, pixels)


def test_images_can_be_denoised_in_turn(engine: DitEngine, cache: Any) -> None:
    cache(SOME)
    grids = {-1: GRID, -2: Grid(1, 1), -3: GRID}
    executor = engine.executor

    def prepare(name: int) -> None:
        tokens = np.zeros(grids[name].tokens, dtype=np.int32)
        executor.run(Prepare(name, ("a",), (), tokens, grids[name], 16, 1.5, seed=-name))

    def latents(name: int) -> torch.Tensor:
        return executor._images[name].latents.clone()

    expected = {}
    for name in grids:
        prepare(name)
        skipped = [executor.run(Step(name)) for _ in range(16)]
        assert True in skipped
        expected[name] = latents(name)
        executor.run(Drop(name))
    for name in grids:
        prepare(name)
    for _ in range(16):
        for name in grids:
            executor.run(Step(name))
    for name in grids:
        assert torch.equal(latents(name), expected[name])
        executor.run(Drop(name))


@pytest.mark.parametrize("stopped_after", [1, 6, 15])
def test_image_after_a_cancelled_one_is_unchanged(engine: DitEngine, cache: Any, stopped_after: int) -> None:
    cache(SOME)
    expected = paint(engine, request()).pixels
    context = RequestContext()
    context.add_observer(
        ProgressCallback(lambda progress: context.cancel() if progress.done == stopped_after else None)
    )
    with pytest.raises(CancelledError):
        paint(engine, request(GRID, 4), context)
    assert np.array_equal(paint(engine, request()).pixels, expected)


@pytest.mark.parametrize("settings", [SOME, replace(ALWAYS, enable_taylorseer=True, Bn_compute_blocks=1)], ids=str)
def test_dropped_image_is_freed_without_garbage_collection(
    engine: DitEngine, cache: Any, settings: CacheSettings
) -> None:
    cache(settings)
    executor = engine.executor
    executor.run(Prepare(-5, (), (), np.zeros(2, dtype=np.int32), Grid(1, 2), 20, 1.5, seed=0))
    for _ in range(9):
        executor.run(Step(-5))
    step: Any = executor._images[-5].step
    held = [weakref.ref(tensor) for tensor in (executor._images[-5].latents, step._halves.branches[0].residual)]
    del step
    gc.disable()
    try:
        executor.run(Drop(-5))
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("settings", [ALWAYS, replace(ALWAYS, Bn_compute_blocks=1)], ids=str)
def test_halves_of_a_step_read_no_value(settings: CacheSettings) -> None:
    """A captured step must not wait for the device: tensors on the meta device have no values to read."""
    with torch.device("meta"), torch.inference_mode():
        transformer = GlmImageTransformer2DModel(
            num_layers=3, attention_head_dim=16, num_attention_heads=2, text_embed_dim=8, time_embed_dim=16,
            condition_dim=8, prior_vq_quantizer_codebook_size=16,
        )  # fmt: skip
        branches = [Branch(torch.zeros(1, glyphs, 32), torch.zeros(1, 4, 32)) for glyphs in (3, 1)]
        rotary = (torch.zeros(4, 16), torch.zeros(4, 16))
        conditioning = Conditioning(
            branches, guided=True, tokens=4, guidance_scale=1.5, times=torch.zeros(5, 16), rotary=rotary
        )
        latents, step = torch.zeros(1, 16, 4, 4), torch.zeros(1, dtype=torch.int64)
        model = DitModel(transformer, eager_blocks(transformer))
        halves = DbCacheStep(model, ImageState(conditioning, latents, step, torch.zeros(6)), settings)
        halves.compute_front()
        for reuse in ((False, False), (True, True), (True, False), (False, True)):
            halves.finish(reuse)


@pytest.mark.parametrize("policy", ["slow", "medium", "fast", "ultra"])
def test_every_number_of_steps_has_a_mask(policy: str) -> None:
    for steps in range(1, Limits().num_inference_steps + 1):
        mask = CacheSettings(scm_steps_mask_policy=policy).steps_mask(steps)
        assert mask is not None
        assert len(mask) == steps
        assert set(mask) <= {0, 1}
        assert mask[0] == 1
        assert steps < 8 or 0 in mask


@pytest.mark.parametrize(
    ("hint", "sources", "branches", "steps"),
    [
        (None, 1, 2, [None, None]),
        (0, 0, 2, [0, 0]),
        (1, 1, 2, [0, 0]),
        (1, 2, 2, [0, 0]),
        (50, 0, 2, [25, 25]),
        (51, 0, 2, [26, 25]),
        (51, 1, 2, [25, 25]),
        (25, 0, 1, [25]),
        (25, 3, 1, [22]),
    ],
)
def test_refresh_hint_counts_passes_of_the_transformer(
    hint: int | None, sources: int, branches: int, steps: list[int | None]
) -> None:
    settings = CacheSettings(force_refresh_step_hint=hint)
    assert [settings.refresh_step(sources, branch, branches) for branch in range(branches)] == steps


def settings_of(**parameters: str) -> CacheSettings | None:
    return read(DitParameters, parameters).engine.cache


def test_default_parameters_are_the_default_settings() -> None:
    assert settings_of() is None
    assert settings_of(cache="cache_dit") == CacheSettings()


def test_parameters_are_read() -> None:
    given = CacheSettings(2, 3, 0, 1.5, -1, 7, True, 2, "fast", "static", 25)
    text = {f"cache_{name}": str(value).lower() for name, value in vars(given).items()}
    text = {name.replace("cache_fn", "cache_Fn"): value for name, value in text.items()}
    assert settings_of(cache="cache_dit", **text) == given


@pytest.mark.parametrize("on", ["none", "cache_dit"])
@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("cache_Fn_compute_blocks", ["0", "-1", "one", "1.0", ""], "a whole number of at least 1"),
        ("cache_Bn_compute_blocks", ["-1", " 1"], "a whole number of at least 0"),
        ("cache_max_warmup_steps", ["-1", "4.5"], "a whole number of at least 0"),
        ("cache_residual_diff_threshold", ["-0.1", "nan", "inf", "low", ""], "a number of at least 0"),
        ("cache_max_continuous_cached_steps", ["-2", "x"], r"a whole number of at least 0, or -1 \(no limit\)"),
        ("cache_max_cached_steps", ["-3", ""], r"a whole number of at least 0, or -1 \(no limit\)"),
        ("cache_enable_taylorseer", ["True", "yes", ""], "false, true"),
        ("cache_taylorseer_order", ["0", "-1"], "a whole number of at least 1"),
        ("cache_scm_steps_mask_policy", ["Fast", "off"], "none, slow, medium, fast, ultra"),
        ("cache_scm_steps_policy", ["none"], "dynamic, static"),
        ("cache_force_refresh_step_hint", ["-1", "", "off"], "none, or a whole number of at least 0"),
    ],
)
def test_invalid_parameters_are_refused(on: str, name: str, values: list[str], allowed: str) -> None:
    for value in values:
        with pytest.raises(ConfigurationError, match=f"^{name} is '{value}'; allowed: {allowed}$"):
            settings_of(cache=on, **{name: value})


@pytest.mark.parametrize(("front", "back"), [(BLOCKS, 0), (1, BLOCKS - 1), (4, 3)])
def test_transformer_of_too_few_blocks_is_refused(folder: Path, front: int, back: int) -> None:
    message = f"are {front} and {back}; allowed: fewer in all than the transformer's {BLOCKS} blocks"
    with pytest.raises(ConfigurationError, match=message):
        load(folder, CacheSettings(Fn_compute_blocks=front, Bn_compute_blocks=back))


def test_missing_package_is_named_where_a_mask_needs_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    _steps_mask.cache_clear()
    expected = r"^cache_scm_steps_mask_policy is 'fast', but the package cache-dit cannot be used: "
    with pytest.raises(ConfigurationError, match=expected):
        load(folder, CacheSettings(scm_steps_mask_policy="fast"))
    load(folder, CacheSettings()).close()  # without a mask cache-dit is not needed

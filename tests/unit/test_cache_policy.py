"""The residual cache's decisions and extrapolations against those of cache-dit."""

from __future__ import annotations

from typing import Any

import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig
from cache_dit.caching.cache_contexts import CachedContextManager
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glm_image.dit.cache import SCM_MASK_POLICIES, SCM_POLICIES, UNLIMITED, CacheSettings
from glm_image.dit.cache_policy import ReusePolicy, TaylorSeer

CONTEXT = "branch"
RESIDUAL = "Bn_residual"

LIMITS = st.sampled_from([UNLIMITED, 0, 1, 2, 5])
SETTINGS = st.builds(
    CacheSettings,
    max_warmup_steps=st.integers(0, 5),
    residual_diff_threshold=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0, 3.0]),
    max_continuous_cached_steps=LIMITS,
    max_cached_steps=LIMITS,
    enable_taylorseer=st.booleans(),
    taylorseer_order=st.integers(1, 3),
    scm_steps_mask_policy=st.sampled_from(SCM_MASK_POLICIES),
    scm_steps_policy=st.sampled_from(SCM_POLICIES),
)
CHANGES = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.6, 2.0, float("inf"), float("nan")]), min_size=1, max_size=24)
REFRESH_STEPS = st.none() | st.integers(0, 12)


class CacheDitBranch(CachedContextManager):  # type: ignore[misc]
    """One branch of cache-dit's DBCache, which is given the changes in place of the tensors."""

    def __init__(self, settings: CacheSettings, steps: int, refresh_step: int | None) -> None:
        super().__init__(CONTEXT)
        self.change = 0.0
        mask = settings.steps_mask(steps)
        taylorseer = TaylorSeerCalibratorConfig(
            enable_encoder_calibrator=False, taylorseer_order=settings.taylorseer_order
        )
        self.new_context(
            name=CONTEXT,
            cache_config=DBCacheConfig(
                residual_diff_threshold=settings.residual_diff_threshold,
                max_warmup_steps=settings.max_warmup_steps,
                max_cached_steps=settings.max_cached_steps,
                max_continuous_cached_steps=settings.max_continuous_cached_steps,
                enable_separate_cfg=False,
                steps_computation_mask=None if mask is None else list(mask),
                steps_computation_policy=settings.scm_steps_policy,
                force_refresh_step_hint=refresh_step,
            ),
            calibrator_config=taylorseer if settings.enable_taylorseer else None,
        )

    def begin_step(self, change: float) -> bool:
        self.change = change
        self.set_context(CONTEXT)
        self.mark_step_begin()
        # A static policy does not check whether anything has been computed.
        if self.get_Fn_buffer() is None or not self.can_cache(torch.zeros(1)):
            self.set_Fn_buffer(torch.zeros(1))
            return False
        self.add_cached_step()
        return True

    def similarity(self, *_: Tensor, threshold: float, **__: Any) -> bool:
        change = -1.0 if threshold >= 1.0 else self.change
        self.add_residual_diff(change)
        return change < threshold


@given(settings=SETTINGS, changes=CHANGES, refresh_step=REFRESH_STEPS)
def test_decisions_and_extrapolations_are_those_of_cache_dit(
    settings: CacheSettings, changes: list[float], refresh_step: int | None
) -> None:
    reference = CacheDitBranch(settings, len(changes), refresh_step)
    policy = ReusePolicy(settings, settings.steps_mask(len(changes)), refresh_step)
    series, values = TaylorSeer(settings.taylorseer_order), torch.Generator().manual_seed(len(changes))
    for step, change in enumerate(changes):
        reuses = policy.begin_step(lambda change=change: change)  # type: ignore[misc]
        assert reuses == reference.begin_step(change), f"step {step}"
        if not settings.enable_taylorseer:
            continue
        if reuses:
            assert torch.equal(series.extrapolate(policy.step), reference.get_Bn_buffer(RESIDUAL)), f"step {step}"
        else:
            computed = torch.randn(5, generator=values)
            series.update(computed, policy.step)
            reference.set_Bn_buffer(computed.clone(), RESIDUAL)


def test_change_is_read_only_where_it_decides() -> None:
    def unread() -> float:
        raise AssertionError("the change is read")

    for settings in (
        CacheSettings(max_warmup_steps=9),
        CacheSettings(residual_diff_threshold=0.0),
        CacheSettings(residual_diff_threshold=1.0),
        CacheSettings(max_cached_steps=0),
        CacheSettings(max_continuous_cached_steps=0),
    ):
        policy = ReusePolicy(settings, None, None)
        for _ in range(9):
            policy.begin_step(unread)


def test_series_keeps_the_values_it_was_given() -> None:
    series, value = TaylorSeer(1), torch.ones(2)
    series.update(value, 0)
    value.zero_()
    assert series.extrapolate(1).tolist() == [1.0, 1.0]

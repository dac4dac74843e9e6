"""Whether a branch of a step may reuse what it has: cache-dit's own bookkeeping, told the change instead of tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig, steps_mask
from cache_dit.caching.cache_contexts import CachedContextManager
from torch import Tensor

from glm_image.dit.cache import CacheSettings

CONTEXT = "branch"
RESIDUAL = "Bn_residual"

ALWAYS_SIMILAR = 1.0
"""From this threshold on cache-dit does not look at the change."""

STEPS_WITH_A_MASK = 8
"""cache-dit has masks from here on, and for a few smaller numbers."""


class BranchDecisions(CachedContextManager):  # type: ignore[misc]
    """One branch of one picture.

    Each branch of guidance decides for itself, which is cache-dit's ``enable_separate_cfg`` with its default
    ``cfg_diff_compute_separate``; a branch of its own needs neither, and a picture without guidance has but one.

    Args:
        settings: what decides.
        steps: the picture's.
        refresh_step: the step before which all is forgotten, or None.
        residual: what the middle blocks added to the image tokens in the step last computed, written by each such step.
        text_residual: the same of the text tokens; None where nothing reads it.
        change: tells the relative L1 change of the front blocks' residual since that step; asked only where it decides.
    """

    def __init__(
        self,
        settings: CacheSettings,
        steps: int,
        refresh_step: int | None,
        residual: Tensor,
        text_residual: Tensor | None,
        change: Callable[[], float],
    ) -> None:
        super().__init__(CONTEXT)
        self._residuals = (residual, text_residual)
        self._change = change
        self._extrapolates = settings.enable_taylorseer
        self.new_context(
            name=CONTEXT,
            cache_config=_config(settings, steps, refresh_step),
            calibrator_config=_calibrator(settings, text_residual is not None),
        )

    def begin_step(self) -> bool:
        """Begins a step; returns whether it reuses, and if so leaves in the residuals what is to be added."""
        self.set_context(CONTEXT)
        self.mark_step_begin()
        residual, _ = self._residuals
        # A policy without a look at the change does not ask whether there is anything to reuse.
        if self.get_Fn_buffer() is None or not self.can_cache(residual):
            self.set_Fn_buffer(residual)  # only whether there is one matters: ``similarity`` is told the change
            return False
        self.add_cached_step()
        if self._extrapolates:
            self._extrapolate()
        return True

    def end_computed_step(self) -> None:
        """Takes note of the residuals that a step has computed."""
        if self._extrapolates:  # what is kept must not change with the next step
            residual, text_residual = self._residuals
            self.set_Bn_buffer(residual.clone(), RESIDUAL)
            if text_residual is not None:
                self.set_Bn_encoder_buffer(text_residual.clone(), RESIDUAL)

    def _extrapolate(self) -> None:
        residual, text_residual = self._residuals
        residual.copy_(self.get_Bn_buffer(RESIDUAL))
        if text_residual is not None:
            text_residual.copy_(self.get_Bn_encoder_buffer(RESIDUAL))

    def similarity(self, *_: Tensor, threshold: float, **__: Any) -> bool:
        """Tells whether the change is below the threshold, and notes it."""
        change = -1.0 if threshold >= ALWAYS_SIMILAR else self._change()
        self.add_residual_diff(change)
        return change < threshold


def _config(settings: CacheSettings, steps: int, refresh_step: int | None) -> DBCacheConfig:
    return DBCacheConfig(
        Fn_compute_blocks=settings.Fn_compute_blocks,
        Bn_compute_blocks=settings.Bn_compute_blocks,
        residual_diff_threshold=settings.residual_diff_threshold,
        max_warmup_steps=settings.max_warmup_steps,
        max_cached_steps=settings.max_cached_steps,
        max_continuous_cached_steps=settings.max_continuous_cached_steps,
        enable_separate_cfg=False,
        steps_computation_mask=computation_mask(settings.scm_steps_mask_policy, steps),
        steps_computation_policy=settings.scm_steps_policy,
        force_refresh_step_hint=refresh_step,
    )


def _calibrator(settings: CacheSettings, with_text: bool) -> TaylorSeerCalibratorConfig | None:
    if not settings.enable_taylorseer:
        return None
    return TaylorSeerCalibratorConfig(enable_encoder_calibrator=with_text, taylorseer_order=settings.taylorseer_order)


@lru_cache(maxsize=256)
def computation_mask(policy: str, steps: int) -> list[int] | None:
    """Returns 1 for each step that computes everything and 0 for the others; None without a policy.

    cache-dit has no mask for fewer than 4 steps and for 5 and 7: all of those are computed.
    """
    if policy == "none":
        return None
    if steps < STEPS_WITH_A_MASK and steps not in {4, 6}:
        return [1] * steps
    mask: list[int] = steps_mask(total_steps=steps, mask_policy=policy)
    return mask

"""Policy of the residual cache: which steps reuse the middle blocks' residuals, and how those are extrapolated.

Both follow cache-dit's DBCache and TaylorSeer, which the tests compare them with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile

from torch import Tensor

from glm_image.dit.cache import UNLIMITED, CacheSettings

ALWAYS_SIMILAR = 1.0
"""From this threshold on steps reuse whatever the change is."""

FIRST_STEP_WITH_DERIVATIVES = 3
"""TaylorSeer takes no differences between the first steps, which are far from each other."""


class ReusePolicy:
    """Decides for one branch of one image which steps reuse.

    Each branch of guidance decides for itself, as with cache-dit's ``enable_separate_cfg`` and its default
    ``cfg_diff_compute_separate``.

    Args:
        mask: 1 for each step that must compute, 0 for the others; None = no mask.
        refresh_step: the step before which the policy starts anew, as for a new image; None = never.

    Attributes:
        step: the current step, counted from the latest start.
    """

    def __init__(self, settings: CacheSettings, mask: Sequence[int] | None, refresh_step: int | None) -> None:
        self._settings, self._mask, self._refresh_step = settings, mask, refresh_step
        self._warmup_steps = settings.max_warmup_steps
        if mask is not None:
            self._warmup_steps = min(self._warmup_steps, len(list(takewhile(bool, mask))))
        self._steps_in_all = 0
        self._restart()

    def _restart(self) -> None:
        self.step = -1
        self._cached = self._continuous = 0

    def begin_step(self, change: Callable[[], float]) -> bool:
        """Begins the next step; returns whether it reuses.

        ``change`` returns the relative L1 change of the front blocks' residual since the step last computed; called
        only where the change decides.
        """
        if self._steps_in_all == self._refresh_step:
            self._restart()
        self._steps_in_all += 1
        self.step += 1
        reuses = self.step > 0 and self._may_reuse(change)
        self._cached += reuses
        self._continuous = self._continuous + 1 if reuses else 0
        return reuses

    def _may_reuse(self, change: Callable[[], float]) -> bool:
        settings = self._settings
        if self.step < self._warmup_steps:
            return False
        if self._mask is not None:
            if self.step < len(self._mask) and self._mask[self.step]:
                return False
            if settings.scm_steps_policy == "static":
                return True
        if settings.max_cached_steps != UNLIMITED and self._cached >= settings.max_cached_steps:
            return False
        limit = settings.max_continuous_cached_steps
        if limit != UNLIMITED and self._continuous >= limit:
            return False
        threshold = settings.residual_diff_threshold
        return threshold >= ALWAYS_SIMILAR or (threshold > 0 and change() < threshold)


class TaylorSeer:
    """Extrapolates a tensor from the steps that computed it, by its Taylor series (TaylorSeer, Liu et al., 2025).

    The derivatives, up to ``order``, are finite differences.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._terms: list[Tensor] = []
        self._computed_step = 0

    def update(self, value: Tensor, step: int) -> None:
        """Takes the value that a step computed; step 0 starts anew."""
        terms = [value.clone()]
        if step >= FIRST_STEP_WITH_DERIVATIVES:
            for previous in self._terms[: self._order]:
                terms.append((terms[-1] - previous) / (step - self._computed_step))
        self._terms, self._computed_step = terms, step

    def extrapolate(self, step: int) -> Tensor:
        elapsed = float(step - self._computed_step)
        value = self._terms[0]
        for power, derivative in enumerate(self._terms[1:], start=1):
            value = value + (1 / math.factorial(power)) * derivative * elapsed**power
        return value

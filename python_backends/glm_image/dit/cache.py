"""Settings of the residual cache (cache-dit's DBCache), named as in cache-dit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from glm_image.errors import ConfigurationError
from glm_image.request.declaration import choice, number, switch, whole

SCM_MASK_POLICIES: Final = ("none", "slow", "medium", "fast", "ultra")
SCM_POLICIES: Final = ("dynamic", "static")

UNLIMITED: Final = -1


STEPS_WITH_A_MASK: Final = 8
"""cache-dit has masks from here on, and for 4 and 6 steps."""


@dataclass(frozen=True)
class CacheSettings:
    """Settings of the residual cache; fields as in cache-dit's ``DBCacheConfig``."""

    Fn_compute_blocks: int = whole(
        1,
        "Blocks at the front that every step computes; the change of their residual decides about the others.",
        low=1,
    )
    Bn_compute_blocks: int = whole(0, "Blocks at the back that every step computes.", low=0)
    max_warmup_steps: int = whole(4, "Steps at the start that compute every block.", low=0)
    residual_diff_threshold: float = number(
        0.24, "Relative L1 change below which a step reuses: 0 never does, 1 and above always does."
    )
    max_continuous_cached_steps: int = whole(3, "Consecutive steps that may reuse.", low=0, unlimited=True)
    max_cached_steps: int = whole(UNLIMITED, "Steps of an image that may reuse.", low=0, unlimited=True)
    enable_taylorseer: bool = switch(
        False, "Extrapolate the reused residual (TaylorSeer, Liu et al., 2025) instead of repeating it."
    )
    taylorseer_order: int = whole(1, "The highest derivative of the extrapolation.", low=1)
    scm_steps_mask_policy: str = choice(
        "none", SCM_MASK_POLICIES, "A fixed pattern of steps; steps outside its gaps compute every block."
    )
    scm_steps_policy: str = choice(
        "dynamic",
        SCM_POLICIES,
        "Steps in a gap of the pattern: `dynamic` compares the change with the threshold, `static` always reuses.",
    )
    force_refresh_step_hint: int | None = whole(
        None,
        "Pass of the transformer before which the cache is cleared, as at the start of an image. Each source image "
        "is one pass, then each step is one pass for each branch of guidance.",
        low=0,
        none=True,
    )

    def check(self, blocks: int) -> None:
        """Raises ConfigurationError where the settings do not fit a transformer of so many blocks."""
        front, back = self.Fn_compute_blocks, self.Bn_compute_blocks
        if front + back >= blocks:
            raise ConfigurationError(
                f"cache_Fn_compute_blocks and cache_Bn_compute_blocks are {front} and {back}; "
                f"allowed: fewer in all than the transformer's {blocks} blocks"
            )
        try:
            self.steps_mask(STEPS_WITH_A_MASK)
        except ImportError as error:
            raise ConfigurationError(
                f"cache_scm_steps_mask_policy is {self.scm_steps_mask_policy!r}, but the package cache-dit cannot be "
                f"used: {error}"
            ) from error

    def parts(self, blocks: int) -> tuple[range, range, range]:
        """Returns the front, middle and back blocks of a transformer of so many blocks."""
        back = blocks - self.Bn_compute_blocks
        return range(self.Fn_compute_blocks), range(self.Fn_compute_blocks, back), range(back, blocks)

    def steps_mask(self, steps: int) -> tuple[int, ...] | None:
        """Returns 1 for each step of an image that computes everything and 0 for the others; None without a policy."""
        return None if self.scm_steps_mask_policy == "none" else _steps_mask(self.scm_steps_mask_policy, steps)

    def refresh_step(self, sources: int, branch: int, branches: int) -> int | None:
        """Returns the step before which a branch (0: conditional) starts anew; None = never.

        ``sources`` are the passes of source images before the first step, ``branches`` the passes of a step.
        """
        if self.force_refresh_step_hint is None:
            return None
        return max(0, -(-(self.force_refresh_step_hint - sources - branch) // branches))


@lru_cache(maxsize=256)
def _steps_mask(policy: str, steps: int) -> tuple[int, ...]:
    # cache-dit has no mask for fewer than 4 steps and for 5 and 7: all of those are computed.
    if steps < STEPS_WITH_A_MASK and steps not in {4, 6}:
        return (1,) * steps
    from cache_dit import steps_mask  # noqa: PLC0415 - takes seconds, which only this policy needs

    return tuple(steps_mask(total_steps=steps, mask_policy=policy))

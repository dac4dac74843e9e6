"""What the residual cache (cache-dit's DBCache) is asked to do, in its own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from glm_image.errors import ConfigurationError

SCM_MASK_POLICIES: Final = ("none", "slow", "medium", "fast", "ultra")
SCM_POLICIES: Final = ("dynamic", "static")

UNLIMITED: Final = -1


@dataclass(frozen=True)
class CacheSettings:
    """When a step may reuse an earlier one's middle blocks; fields as in cache-dit's ``DBCacheConfig``.

    Attributes:
        Fn_compute_blocks: blocks at the front that every step computes; how their residual changes decides the rest.
        Bn_compute_blocks: blocks at the back that every step computes.
        max_warmup_steps: steps at the start that compute everything.
        residual_diff_threshold: relative L1 change below which a step reuses; 0 never does, 1 and above always.
        max_continuous_cached_steps: steps in a row that may reuse; ``UNLIMITED``.
        max_cached_steps: steps of a picture that may reuse; ``UNLIMITED``.
        enable_taylorseer: extrapolate what is reused (TaylorSeer, Liu et al., 2025) rather than take it as it was.
        taylorseer_order: the highest derivative of that.
        scm_steps_mask_policy: one of ``SCM_MASK_POLICIES``: steps outside the policy's gaps compute everything.
        scm_steps_policy: one of ``SCM_POLICIES``: whether a step in a gap still looks at the change.
        force_refresh_step_hint: pass of the transformer before which all is forgotten, as if a picture began there: a
            source image is one, and then a step one for each branch of guidance; None = never.
    """

    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    max_warmup_steps: int = 4
    residual_diff_threshold: float = 0.24
    max_continuous_cached_steps: int = 3
    max_cached_steps: int = UNLIMITED
    enable_taylorseer: bool = False
    taylorseer_order: int = 1
    scm_steps_mask_policy: str = "none"
    scm_steps_policy: str = "dynamic"
    force_refresh_step_hint: int | None = None

    def check(self, blocks: int) -> None:
        """Raises ConfigurationError where they do not fit a transformer of so many blocks."""
        front, back = self.Fn_compute_blocks, self.Bn_compute_blocks
        if front + back >= blocks:
            raise ConfigurationError(
                f"cache_Fn_compute_blocks and cache_Bn_compute_blocks are {front} and {back}; "
                f"allowed: fewer in all than the transformer's {blocks} blocks"
            )

    def parts(self, blocks: int) -> tuple[range, range, range]:
        """Returns which of so many blocks are computed always, when nothing is reused, and always again."""
        back = blocks - self.Bn_compute_blocks
        return range(self.Fn_compute_blocks), range(self.Fn_compute_blocks, back), range(back, blocks)

    def refresh_step(self, sources: int, branch: int, branches: int) -> int | None:
        """Returns the step before which a branch forgets; None = never.

        Args:
            sources: passes of source images before the first step.
            branch: 0 is the conditional one, whose pass comes first in a step.
            branches: passes of a step.
        """
        if self.force_refresh_step_hint is None:
            return None
        return max(0, -(-(self.force_refresh_step_hint - sources - branch) // branches))

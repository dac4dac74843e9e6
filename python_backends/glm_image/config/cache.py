"""The residual cache as ``config.pbtxt`` has it."""

from __future__ import annotations

from glm_image.config.instance import Instance
from glm_image.dit.cache import CacheSettings


def cache_settings(instance: Instance) -> CacheSettings | None:
    """Reads the parameters of the residual cache; None when it is off.

    Raises:
        ConfigurationError: a value is not allowed, whether the cache is on or off.
    """
    settings = CacheSettings(
        Fn_compute_blocks=instance.integer("cache_Fn_compute_blocks", low=1),
        Bn_compute_blocks=instance.integer("cache_Bn_compute_blocks", low=0),
        max_warmup_steps=instance.integer("cache_max_warmup_steps", low=0),
        residual_diff_threshold=instance.threshold("cache_residual_diff_threshold"),
        max_continuous_cached_steps=instance.limit("cache_max_continuous_cached_steps"),
        max_cached_steps=instance.limit("cache_max_cached_steps"),
        enable_taylorseer=instance.parameters["cache_enable_taylorseer"] == "true",
        taylorseer_order=instance.integer("cache_taylorseer_order", low=1),
        scm_steps_mask_policy=instance.parameters["cache_scm_steps_mask_policy"],
        scm_steps_policy=instance.parameters["cache_scm_steps_policy"],
        force_refresh_step_hint=instance.optional_integer("cache_force_refresh_step_hint", low=0),
    )
    return settings if instance.parameters["cache"] == "cache_dit" else None

"""Bounds of the numbers in a checkpoint's configs, checked before anything is built of them. No torch.

A number that is not allowed raises ``CheckpointError``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from glm_image.errors import CheckpointError, shown

LARGEST_SIZE = 2**20
"""Of a width, a vocabulary or a number of heads; the largest published one is 168064."""

MOST_LAYERS = 1000
"""Of a component whose tensors are not read, so that nothing else bounds it; the published ones have up to 40."""

MOST_TIMESTEPS = 1_000_000
"""The scheduler has a table of them; the published one has 1000."""

SIZES: dict[str, tuple[str, ...]] = {
    "vision_language_encoder": (
        "text_config.vocab_size",
        "text_config.vision_vocab_size",
        "text_config.hidden_size",
        "text_config.intermediate_size",
        "text_config.num_attention_heads",
        "text_config.num_key_value_heads",
        "text_config.head_dim",
        "vision_config.hidden_size",
        "vision_config.intermediate_size",
        "vision_config.num_heads",
        "vision_config.image_size",
        "vision_config.patch_size",
        "vision_config.spatial_merge_size",
        "vision_config.in_channels",
        "vq_config.num_embeddings",
        "vq_config.embed_dim",
        "vq_config.latent_channels",
    ),
    "text_encoder": (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    ),
    "transformer": (
        "num_attention_heads",
        "attention_head_dim",
        "time_embed_dim",
        "condition_dim",
        "text_embed_dim",
        "patch_size",
        "in_channels",
        "out_channels",
        "prior_vq_quantizer_codebook_size",
    ),
    "vae": ("in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size"),
    "scheduler": ("base_image_seq_len", "max_image_seq_len"),
}
"""Component -> config fields that are whole numbers from 1 to ``LARGEST_SIZE``."""

POSITIVE: dict[str, tuple[str, ...]] = {
    "vision_language_encoder": (
        "text_config.rms_norm_eps",
        "text_config.rope_parameters.rope_theta",
        "text_config.rope_parameters.partial_rotary_factor",
    ),
    "text_encoder": ("layer_norm_epsilon",),
    "vae": ("scaling_factor",),
}
"""Component -> config fields that are numbers above 0."""

LAYERS: dict[str, tuple[tuple[str, str], ...]] = {
    "vision_language_encoder": (
        ("text_config.num_hidden_layers", r"model\.language_model\.layers\.(\d+)\."),
        ("vision_config.depth", r"model\.visual\.blocks\.(\d+)\."),
    ),
    "text_encoder": (("num_layers", r"encoder\.block\.(\d+)\."),),
    "transformer": (("num_layers", r"transformer_blocks\.(\d+)\."),),
    "vae": (
        ("layers_per_block", r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        ("block_out_channels", r"encoder\.down_blocks\.(\d+)\."),
    ),
}
"""Component -> config fields that repeat a module, and the names of its tensors. Of a list, the length counts."""


def check_config(path: Path, component: str, config: Mapping[str, Any], tensors: Collection[str] | None) -> None:
    """Checks the config of a component.

    Args:
        path: of the config's file.
        component: its folder.
        config: the content of the file.
        tensors: the names of the component's tensors; None = they are not known.
    """
    for field in SIZES.get(component, ()):
        _check(path, config, field, _is_size, f"a whole number from 1 to {LARGEST_SIZE}")
    for field in POSITIVE.get(component, ()):
        _check(path, config, field, _is_positive, "a number above 0")
    for field, pattern in LAYERS.get(component, ()):
        _check_layers(path, config, field, pattern, tensors)
    if component == "scheduler":
        most = f"a whole number from 1 to {MOST_TIMESTEPS}"
        _check(path, config, "num_train_timesteps", lambda value: _is_whole(value, MOST_TIMESTEPS), most)
    if component == "vae":
        channels = _value(config, "latent_channels")
        for field, allowed, what in (
            ("latents_mean", _is_number, "numbers"),
            ("latents_std", _is_positive, "numbers above 0"),
        ):
            _check_list(path, config, field, allowed, f"a list of {channels} {what}", channels)
        _check_list(path, config, "block_out_channels", _is_size, f"a list of whole numbers from 1 to {LARGEST_SIZE}")


def _check(path: Path, config: Mapping[str, Any], field: str, is_allowed: Callable[[Any], bool], allowed: str) -> None:
    value = _value(config, field)
    if value is not None and not is_allowed(value):
        raise CheckpointError(f"{path}: {field} is {shown(value)}; allowed: {allowed}")


def _check_list(
    path: Path,
    config: Mapping[str, Any],
    field: str,
    is_allowed: Callable[[Any], bool],
    allowed: str,
    length: int | None = None,
) -> None:
    def is_list(value: Any) -> bool:
        return isinstance(value, list) and all(map(is_allowed, value)) and length in (None, len(value))

    _check(path, config, field, is_list, allowed)


def _check_layers(
    path: Path, config: Mapping[str, Any], field: str, pattern: str, tensors: Collection[str] | None
) -> None:
    value = _value(config, field)
    count = len(value) if isinstance(value, list) else value
    if value is None:
        return
    if tensors is None:
        if not _is_whole(count, MOST_LAYERS):
            raise CheckpointError(f"{path}: {field} is {shown(count)}; allowed: a whole number from 1 to {MOST_LAYERS}")
        return
    present = len({found[1] for found in map(re.compile(pattern).match, tensors) if found})
    if isinstance(count, bool) or count != present:
        raise CheckpointError(f"{path}: {field} is {shown(count)}; by the tensors of the component it is {present}")


def _value(config: Mapping[str, Any], field: str) -> Any:
    """Returns the value of a dotted field; None if there is none."""
    value: Any = config
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_size(value: Any) -> bool:
    return _is_whole(value, LARGEST_SIZE)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0

"""The commands with which a draining server has its models unloaded, by one model for all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import triton_python_backend_utils as pb_utils

from glm_image.config.instance import served_stages
from glm_image.config.models import ENTRY_MODELS, STAGES


def unload_commands(model: str, index: int) -> Mapping[str, Callable[[], None]]:
    """Returns the commands of an instance: the first of ``glm_ar``, or else of ``glm_dit``, unloads all models."""
    unloads = model == "glm_ar" or "glm_ar" not in served_stages()
    if index != 0 or not unloads:
        return {}
    return {"drain": partial(_unload, ENTRY_MODELS), "unload": partial(_unload, STAGES)}


def _unload(models: Sequence[str]) -> None:
    """Unloads models; requests in flight go on, and Triton ends a model's process after its last one."""
    for model in models:
        with contextlib.suppress(pb_utils.TritonModelException):  # this server was started without it
            pb_utils.unload_model(model)

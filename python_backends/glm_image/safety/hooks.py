"""The interface of a safety hook, and how one is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm_image.errors import ConfigurationError
from glm_image.safety.settings import SafetySettings
from glm_image.safety.verdict import Verdict

CheckPrompt = Callable[[str], Verdict]
CheckImage = Callable[[NDArray[np.uint8]], Verdict]


@dataclass(frozen=True)
class Hook:
    """The checks of a hook; None = it has no such check.

    A hook is a class with one or both of these methods. They are called from several threads at the same time.

    Attributes:
        check_prompt: of a text.
        check_image: of an image, uint8 [height, width, 3].
    """

    check_prompt: CheckPrompt | None = None
    check_image: CheckImage | None = None


def load_hook(settings: SafetySettings) -> Hook:
    """Makes an instance of the class that ``safety`` names, with ``source`` if there is one.

    Raises:
        ConfigurationError: it cannot be imported or made, or has no check.
    """
    if not settings.safety:
        return Hook()
    module, _, name = settings.safety.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        made = kind(source=settings.safety_source) if settings.safety_source else kind()
    except Exception as error:  # of the operator's own code
        raise ConfigurationError(
            f"safety is {settings.safety!r}, which cannot be loaded: {type(error).__name__}: {error}; allowed: none, "
            "or MODULE:CLASS on PYTHONPATH"
        ) from error
    hook = Hook(getattr(made, "check_prompt", None), getattr(made, "check_image", None))
    if hook == Hook():
        raise ConfigurationError(
            f"safety is {settings.safety!r}, which has neither check_prompt nor check_image; allowed: a class with one"
        )
    return hook

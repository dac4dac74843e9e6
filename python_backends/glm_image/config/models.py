"""Names of the models. Imports nothing: the supervisor runs before any package is installed."""

from __future__ import annotations

from typing import Final

ENTRY_MODELS: Final = ("glm_image", "glm_image_stream")
"""The models that clients send whole requests to; a draining server unloads them first."""

STAGES: Final = ("glm_control", "glm_dit", "glm_ar")
"""The models that a draining server unloads, in this order, when no request is left; ``glm_ar`` unloads them all."""

"""The models that take whole requests; imports nothing, because the supervisor runs before anything is installed."""

from __future__ import annotations

from typing import Final

ENTRY_MODELS: Final = ("glm_image", "glm_image_stream")
"""A server that drains unloads them first."""

STAGES: Final = ("glm_control", "glm_dit", "glm_ar")
"""What it unloads when no request is left; the last one unloads them all."""

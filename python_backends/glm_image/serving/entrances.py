"""The models that take whole requests; imports nothing, because the supervisor runs before anything is installed."""

from __future__ import annotations

from typing import Final

ENTRANCES: Final = ("glm_image", "glm_image_stream")
"""A server that drains unloads them first."""

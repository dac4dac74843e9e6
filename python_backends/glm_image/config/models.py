"""Names of the models. Imports nothing: the supervisor runs before any package is installed."""

from __future__ import annotations

from typing import Final

ENTRY_MODELS: Final = ("glm_image", "glm_image_stream", "glm_ar_stream", "glm_dit_stream")
"""The models that forward requests to others; a draining server unloads them first."""

STAGES: Final = ("glm_control", "glm_dit", "glm_ar")
"""The models that a draining server unloads, in this order, when no request is left; ``glm_ar`` unloads them all, in a
server without it ``glm_dit``."""

POOL_MODELS: Final = {
    "glm_ar": ("glm_ar", "glm_ar_stream", "glm_control"),
    "glm_dit": ("glm_dit", "glm_dit_stream", "glm_control"),
}
"""What a server of a pool loads for each stage that it serves; see docs/fleet.md."""

STAGE_STREAMS: Final = ("glm_ar_stream", "glm_dit_stream")
"""Models of pools alone, which a server of both stages does not load unless it is asked for its stages."""

SERVED_VARIABLE: Final = "GLM_IMAGE_SERVED_STAGES"
"""The environment variable in which ``serve --models`` names the stages of a server; not set = all models."""

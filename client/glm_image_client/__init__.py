"""Client of a GLM-Image server: ``GlmImageClient`` and the command ``glm-image``."""

from __future__ import annotations

from glm_image_client.client import GlmImageClient, OutputFormat
from glm_image_client.errors import (
    BadArgumentError,
    GlmImageClientError,
    RefusedError,
    RequestTimeout,
    ServerFailure,
    UnreachableError,
)
from glm_image_client.result import GenerationResult, Metadata, PriorTokens
from glm_image_client.tensors import SourceImage

__all__ = [
    "BadArgumentError",
    "GenerationResult",
    "GlmImageClient",
    "GlmImageClientError",
    "Metadata",
    "OutputFormat",
    "PriorTokens",
    "RefusedError",
    "RequestTimeout",
    "ServerFailure",
    "SourceImage",
    "UnreachableError",
]

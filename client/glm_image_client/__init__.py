"""Client of a GLM-Image server: ``GlmImageClient``, ``AsyncGlmImageClient`` and the command ``glm-image``."""

from __future__ import annotations

from glm_image_client.async_client import AsyncGlmImageClient
from glm_image_client.calls import OutputFormat
from glm_image_client.client import GlmImageClient
from glm_image_client.errors import (
    BadArgumentError,
    BusyError,
    GlmImageClientError,
    RefusedError,
    RequestCancelled,
    RequestTimeout,
    ServerFailure,
    UnreachableError,
)
from glm_image_client.events import StreamEvent
from glm_image_client.result import GenerationResult, Metadata, PriorTokens
from glm_image_client.retries import Retries
from glm_image_client.tensors import SourceImage

__all__ = [
    "AsyncGlmImageClient",
    "BadArgumentError",
    "BusyError",
    "GenerationResult",
    "GlmImageClient",
    "GlmImageClientError",
    "Metadata",
    "OutputFormat",
    "PriorTokens",
    "RefusedError",
    "RequestCancelled",
    "RequestTimeout",
    "Retries",
    "ServerFailure",
    "SourceImage",
    "StreamEvent",
    "UnreachableError",
]

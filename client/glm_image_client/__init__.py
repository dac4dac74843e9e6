"""Client of a GLM-Image server: ``GlmImageClient``, ``AsyncGlmImageClient`` and the command ``glm-image``."""

from __future__ import annotations

from glm_image_client._version import __version__
from glm_image_client.client import AsyncGlmImageClient, GlmImageClient
from glm_image_client.errors import (
    BadArgumentError,
    BusyError,
    ContentRefusedError,
    GlmImageClientError,
    PromptsError,
    RefusedError,
    RequestCancelled,
    RequestTimeout,
    ServerFailure,
    UnknownOptionError,
    UnreachableError,
)
from glm_image_client.events import StreamEvent
from glm_image_client.options import (
    ArOptions,
    CommonOptions,
    DitOptions,
    FileMetadata,
    GenerateOptions,
    OutputFormat,
    PaintOptions,
    PreviewOptions,
    PriorOptions,
    StreamOptions,
)
from glm_image_client.pipeline import PipelineOutput, RemotePipeline
from glm_image_client.result import GenerationResult, Metadata, PriorTokens
from glm_image_client.retries import Retries
from glm_image_client.sources import SourceImage

__all__ = [
    "ArOptions",
    "AsyncGlmImageClient",
    "BadArgumentError",
    "BusyError",
    "CommonOptions",
    "ContentRefusedError",
    "DitOptions",
    "FileMetadata",
    "GenerateOptions",
    "GenerationResult",
    "GlmImageClient",
    "GlmImageClientError",
    "Metadata",
    "OutputFormat",
    "PaintOptions",
    "PipelineOutput",
    "PreviewOptions",
    "PriorOptions",
    "PriorTokens",
    "PromptsError",
    "RefusedError",
    "RemotePipeline",
    "RequestCancelled",
    "RequestTimeout",
    "Retries",
    "ServerFailure",
    "SourceImage",
    "StreamEvent",
    "StreamOptions",
    "UnknownOptionError",
    "UnreachableError",
    "__version__",
]

"""The parts of the command that need no server: ``generate --offline`` and ``inspect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from glm_image_client.errors import BadArgumentError, RefusedError, ServerFailure
from glm_image_client.result import GenerationResult, Metadata
from glm_image_client.sources import SourceImage, source_bytes


def generate_offline(
    checkpoint: Path, device: str, values: Mapping[str, Any], images: Sequence[SourceImage] = ()
) -> GenerationResult:
    """Loads a checkpoint, generates once and frees it; a value of None has its default."""
    pipeline, request, errors = _server_modules("--offline", "pipeline", "request.parameters", "errors")
    given = {name: value for name, value in values.items() if value is not None}
    if images:
        given["images"] = tuple(source_bytes(image) for image in images)
    try:
        with pipeline.LocalPipeline(checkpoint=checkpoint, device=device) as engines:
            result = engines.generate(request.GenerationParameters(**given))
    except errors.InvalidInputError as error:
        raise RefusedError(str(error)) from error
    except errors.GlmImageError as error:
        raise ServerFailure(str(error)) from error
    return GenerationResult(Metadata.from_mapping(result.metadata), pixels=np.asarray(result.pixels))


def inspect_checkpoint(folder: Path) -> Any:
    """Returns a ``glm_image.sizing.inspect.Inspection``."""
    inspection, errors = _server_modules("inspect", "sizing.inspect", "errors")
    try:
        return inspection.inspect(folder)
    except errors.CheckpointError as error:
        raise BadArgumentError(str(error)) from error


def _server_modules(command: str, *names: str) -> list[Any]:
    # The client is installed without the server; only these paths import it.
    try:
        return [import_module(f"glm_image.{name}") for name in names]
    except ModuleNotFoundError as error:
        raise BadArgumentError(f"{command} needs the server's package, and {error.name!r} is not installed") from error

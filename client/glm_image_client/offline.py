"""The parts of the command that need no server: ``generate --offline`` and ``inspect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from glm_image_client.calls import source_bytes
from glm_image_client.errors import BadArgumentError, RefusedError, ServerFailure
from glm_image_client.options import SourceImage
from glm_image_client.result import GenerationResult, Metadata


def generate_offline(
    checkpoint: Path, device: str, values: Mapping[str, Any], images: Sequence[SourceImage] = ()
) -> GenerationResult:
    """Loads a checkpoint, generates once and frees it.

    Args:
        checkpoint: a folder with ``model_index.json``.
        device: ``auto``, ``cpu``, ``cuda:0``, ``npu:0``, ...
        values: fields of ``glm_image.request.parameters.GenerationParameters``; None = its default.
        images: source images.

    Raises:
        BadArgumentError: the engines are not installed, or an image cannot be read.
        RefusedError: the request is refused.
        ServerFailure: the engines failed.
    """
    # The client is installed without the engines; only this path imports them.
    try:
        pipeline, request, errors = (
            import_module(f"glm_image.{part}") for part in ("pipeline", "request.parameters", "errors")
        )
    except ModuleNotFoundError as error:
        raise BadArgumentError(f"--offline needs the engines, and {error.name!r} is not installed") from error
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
    """Returns a ``glm_image.sizing.inspect.Inspection``.

    Raises:
        BadArgumentError: the server's package is not installed, or the folder is not a checkpoint.
    """
    try:
        inspection, errors = (import_module(f"glm_image.{part}") for part in ("sizing.inspect", "errors"))
    except ModuleNotFoundError as error:
        raise BadArgumentError(f"inspect needs the server's package, and {error.name!r} is not installed") from error
    try:
        return inspection.inspect(folder)
    except errors.CheckpointError as error:
        raise BadArgumentError(str(error)) from error

"""The parts of the command that use the server's package: ``generate --offline``, ``inspect`` and ``serve``."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from glm_image_client.errors import BadArgumentError, RefusedError, ServerFailure
from glm_image_client.options import OPTIONS
from glm_image_client.result import GenerationResult, Metadata
from glm_image_client.sources import source_bytes, source_images


def generate_offline(checkpoint: Path, device: str | None, prompt: str, options: Mapping[str, Any]) -> GenerationResult:
    """Loads a checkpoint, generates once and frees it; omitted options have the defaults of the checkpoint.

    Raises:
        BadArgumentError: the checkpoint or the device is refused.
        RefusedError: the request is refused.
        ServerFailure: the engines failed.
    """
    folder, pipeline, request, errors = server_modules(
        "--offline", "checkpoint.checkpoint", "pipeline", "request.parameters", "errors"
    )
    given = {name: value for name, value in options.items() if value is not None and name in OPTIONS}
    if images := options.get("images"):
        given["images"] = tuple(source_bytes(image) for image in source_images(images))
    try:
        defaults = folder.Checkpoint.open(checkpoint).defaults
        given = filled(given, defaults)
        with pipeline.LocalPipeline(checkpoint=checkpoint, device="auto" if device is None else device) as engines:
            result = engines.generate(request.GenerationParameters(prompt=prompt, **given))
    except errors.InvalidInputError as error:
        raise RefusedError(str(error)) from error
    except errors.CheckpointError as error:
        raise BadArgumentError(f"--checkpoint is {str(checkpoint)!r}, which cannot be loaded: {error}") from error
    except errors.ConfigurationError as error:
        raise BadArgumentError(str(error)) from error
    except errors.GlmImageError as error:
        raise ServerFailure(str(error)) from error
    files = [base64.b64encode(file) for file in result.encoded]
    pixels = None if files else np.asarray(result.pixels)
    return GenerationResult(Metadata.from_mapping(result.metadata), files, pixels)


def filled(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options in which the size and the steps that are not given are those of ``defaults``.

    The size of image to image follows the first source.
    """
    names = ["num_inference_steps"]
    if not options.get("images") and options.get("width") is None and options.get("height") is None:
        names += ["width", "height"]
    return {**options, **{name: defaults[name] for name in names if options.get(name) is None and name in defaults}}


def inspect_checkpoint(folder: Path) -> Any:
    """Returns a ``glm_image.sizing.inspect.Inspection``."""
    inspection, errors = server_modules("inspect", "sizing.inspect", "errors")
    try:
        return inspection.inspect(folder)
    except errors.CheckpointError as error:
        raise BadArgumentError(str(error)) from error


def server_modules(command: str, *names: str) -> list[Any]:
    """Imports modules of the server's package.

    Raises:
        BadArgumentError: it is not installed.
    """
    # The client is installed without the server; only these paths import it.
    try:
        return [import_module(f"glm_image.{name}") for name in names]
    except ModuleNotFoundError as error:
        raise BadArgumentError(
            f"{command} needs the server's package, and {error.name!r} is not installed: "
            "pip install 'glm-image-triton[server,triton]'"
        ) from error

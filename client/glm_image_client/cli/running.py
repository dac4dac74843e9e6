"""What ``generate`` and ``edit`` share: the server's defaults, the progress, and previews."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from glm_image_client import calls
from glm_image_client.cli.offline import filled
from glm_image_client.cli.progress import Watched, progress_bar, shows_images, watch
from glm_image_client.client import GlmImageClient
from glm_image_client.errors import BadArgumentError, RefusedError, ServerFailure, reason_of
from glm_image_client.options import GenerateOptions
from glm_image_client.result import GenerationResult

PREVIEW_EVERY: Final = 10
"""Denoising steps between two images in --preview-dir."""

PROMPT_FROM_INPUT: Final = "-"

FILE_METADATA: Final = "full"
"""What the command asks for: the user keeps the files."""


@dataclass(frozen=True)
class Progress:
    """How the progress is shown."""

    streamed: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show the progress; the default in a terminal.")
    ] = None
    preview_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for intermediate images, made if missing; implies --stream."),
    ] = None


def read_prompt(prompt: str | None) -> str:
    """Returns the prompt of the arguments; ``-``, or none in a pipe, reads it from standard input.

    Raises:
        BadArgumentError: there is none, or it is not text.
    """
    if prompt is None and sys.stdin.isatty():
        raise BadArgumentError("PROMPT is missing; allowed: a text, or - for standard input")
    if prompt is not None and prompt != PROMPT_FROM_INPUT:
        return prompt
    try:
        return sys.stdin.read().rstrip("\r\n")
    except ValueError as error:
        raise BadArgumentError(f"the prompt on standard input is not text: {error}") from error


def with_file_metadata(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options in which files say everything, unless --file-metadata says otherwise."""
    given = options.get("file_metadata")
    return {**options, "file_metadata": FILE_METADATA if given is None else getattr(given, "value", given)}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises BadArgumentError for a value that cannot be sent, before a server is asked for anything."""
    calls.generate("x", **options)


def with_server_defaults(
    client: GlmImageClient, options: Mapping[str, Any], kind: type = GenerateOptions
) -> dict[str, Any]:
    """Returns options in which the size and the steps that are not given are those that suit the server's checkpoint.

    ``kind`` is the type of the options, which may have no size or no steps.
    """
    try:
        defaults = client.defaults()
    except (RefusedError, ServerFailure):  # another version, or a server without glm_control: its own defaults apply
        defaults = {}
    return filled(options, {name: value for name, value in defaults.items() if name in kind.__annotations__})


def generate_images(
    client: GlmImageClient, prompt: str, options: Mapping[str, Any], progress: Progress, as_json: bool
) -> GenerationResult:
    """Sends a request, streamed where its progress is shown or intermediate images are wanted."""
    has_bar = not as_json and sys.stderr.isatty()
    folder = progress.preview_dir
    if not (has_bar or folder is not None if progress.streamed is None else progress.streamed):
        with progress_bar("generating", shown=has_bar):
            return client.generate(prompt, **options)
    if folder is not None:
        _make_folder(folder)
    has_images = shows_images(folder)
    streamed = {
        **options,
        "preview_steps": None if has_images else 0,
        "preview_every": 0 if folder is None else PREVIEW_EVERY,
    }
    watched = watch(client.stream(prompt, **streamed), has_bar=has_bar, preview_dir=folder)
    if folder is not None and not {"preview", "preview_skipped"} & watched.kinds:  # the latter has its own message
        print(f"glm-image: {_without_preview(watched)}", file=sys.stderr)
    return watched.result


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise BadArgumentError(f"--preview-dir is {str(folder)!r}, which cannot be made: {reason_of(error)}") from error


def _without_preview(watched: Watched) -> str:
    """Returns why a stream had no preview."""
    metadata = watched.result.metadata
    tokens = metadata.tokens
    if tokens.get("source"):
        return "image to image has no preview"
    if 2 * tokens.get("preview", 0) >= tokens.get("image", 0):
        size = f"{metadata.width}x{metadata.height}"
        return f"an image of {size} has no preview: previews are for images of twice their area, above about 725x725"
    return "the server sent no preview"

"""The files that a command writes: their names, and what it prints about them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from glm_image_client.calls import accidental_text
from glm_image_client.cli.flags import DEFAULT_OUTPUT, Output
from glm_image_client.errors import BadArgumentError
from glm_image_client.result import GenerationResult, Metadata, check_template, file_names, format_of

_KNOWN_AFTERWARDS: Final = ("{width}", "{height}", "{seed}")


class OutputFiles:
    """The names of a request's images, checked before the request so that no images are lost.

    Raises:
        BadArgumentError: the suffix or a placeholder is not allowed, the folder does not exist, or a file would be
            overwritten although ``--no-clobber`` is given.
    """

    def __init__(self, output: Output, options: Mapping[str, Any]) -> None:
        self._template = DEFAULT_OUTPUT if output.output is None else output.output
        self._overwrites = output.output is not None and not output.no_clobber
        self.format = format_of(self._template)
        check_template(self._template)
        check_folder(self._template)
        if output.no_clobber and output.output is not None:
            self._check_new(options)

    def save(self, result: GenerationResult) -> list[Path]:
        """Writes the images and returns their files.

        A file that may not be overwritten, whose name was not known before, gets a number.
        """
        template = self._template
        if not self._overwrites:
            count = max(1, len(result.images))
            template = next(
                name for name in _numbered(template) if not _existing(file_names(name, count, result.metadata))
            )
        return result.save(template)

    def _check_new(self, options: Mapping[str, Any]) -> None:
        if any(field in self._template for field in _KNOWN_AFTERWARDS):
            return
        if found := _existing(file_names(self._template, options.get("num_images") or 1, Metadata())):
            raise BadArgumentError(f"--output: {found[0]!r} exists, and --no-clobber does not overwrite it")


def check_folder(output: str) -> None:
    """Raises BadArgumentError if the folder of a file to write does not exist."""
    try:
        has_folder = Path(output).parent.is_dir()
    except ValueError:  # a NUL
        has_folder = False
    if not has_folder:
        raise BadArgumentError(f"--output is {output!r}; allowed: a file in a folder that exists")


def _numbered(template: str) -> itertools.chain[str]:
    path = Path(template)
    further = (str(path.with_name(f"{path.stem}-{number}{path.suffix}")) for number in itertools.count(2))
    return itertools.chain([template], further)


def _existing(names: list[str]) -> list[str]:
    return [name for name in names if Path(name).exists()]


def print_result(prompt: str, result: GenerationResult, files: list[Path], seconds: float, *, as_json: bool) -> None:
    """Prints the files of a result with its size, steps, seeds and the seconds of its stages, or a JSON object.

    Standard error gets a note for lettering that is probably an accident.
    """
    for text in accidental_text(prompt, result.metadata.rendered_text):
        print(
            f"glm-image: note: {text!r}, between two apostrophes, was taken as text to render; "
            "write apostrophes as ’, or name the text with --glyph-text",
            file=sys.stderr,
        )
    names = [str(file) for file in files]
    if as_json:
        print(json.dumps({"files": names, "seeds": result.seeds, "metadata": result.metadata.raw}))
        return
    metadata = result.metadata
    stages = "".join(f"{name} {value:.2f}, " for name, value in metadata.seconds.items())
    seeds = ", ".join(map(str, metadata.seeds))
    print(*names, f"{metadata.width}x{metadata.height}, {metadata.steps} steps, seed {seeds}", sep="\n")
    print(f"seconds: {stages}total {seconds:.2f}")

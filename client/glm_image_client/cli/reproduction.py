"""``show`` and ``generate --like``: the record of an image file, and the request that repeats it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from glm_image_client.errors import BadArgumentError, reason_of
from glm_image_client.file_texts import FileTexts

REPEATED: Final = {
    "negative_prompt": "negative_prompt",
    "glyph_text": "glyph_text",
    "seed": "seed",
    "width": "width",
    "height": "height",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
}
"""Entries of a record, and the options that they are values of."""

SAMPLING: Final = ("temperature", "top_p", "top_k")
COMPARED: Final = ("version", "model", "settings")


def file_texts(path: Path) -> FileTexts:
    """Returns the texts of an image file.

    Raises:
        BadArgumentError: it cannot be read.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            return FileTexts.of_image(image)
    except Exception as error:  # Pillow raises many kinds of errors for broken files
        raise BadArgumentError(f"{str(path)!r} cannot be read: {reason_of(error)}") from error


def file_record(path: Path) -> dict[str, Any]:
    """Returns the record of an image file.

    Raises:
        BadArgumentError: it cannot be read, or has none.
    """
    text = file_texts(path).record
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise BadArgumentError(f"{str(path)!r} has no record of how it was made; allowed: a file with file_metadata")
    return record


def repeated_options(record: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of the request that repeats a record; those that are ``given`` replace its own."""
    options = {option: record[name] for name, option in REPEATED.items() if record.get(name) is not None}
    sampling = record.get("sampling")
    if isinstance(sampling, dict):
        options |= {name: sampling[name] for name in SAMPLING if name in sampling}
    size = ("width", "height")
    if any(given.get(name) is not None for name in size):
        options = {name: value for name, value in options.items() if name not in size}
    return {**given, **{name: value for name, value in options.items() if given.get(name) is None}}


def repeated_prompt(path: Path, record: Mapping[str, Any], given: str | None) -> str:
    """Returns the prompt of a record unless another one is given.

    Raises:
        BadArgumentError: there is none.
    """
    prompt = record.get("prompt") if given is None else given
    if not isinstance(prompt, str):
        raise BadArgumentError(f"--like: {str(path)!r} has no prompt; allowed: a file that has one, or PROMPT")
    return prompt


def check_sources(path: Path, record: Mapping[str, Any], sources: Sequence[bytes]) -> None:
    """Raises BadArgumentError if the source images are not those of the record."""
    stated = record.get("sources")
    hashes = stated.get("sha256") if isinstance(stated, dict) else []
    given = [hashlib.sha256(source).hexdigest() for source in sources]
    if given != hashes:
        raise BadArgumentError(
            f"--like: {str(path)!r} was made of source images with the SHA-256 {hashes}, and --image has {given}; "
            "allowed: the same files in the same order"
        )


def differences(record: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the servers of two records, each as ``NAME is VALUE, was VALUE``."""
    old, new = ({name: item.get(name) for name in COMPARED} for item in (record, made))
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{name} is {after.get(name)}, was {before.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _leaves(value: object, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for key, item in value.items() for leaf in _leaves(item, f"{name}.{key}" if name else str(key))]

"""Reading of a checkpoint's files within bounds. No torch.

A file that is missing, too large or not a regular file raises ``CheckpointError``: a pipe would never end.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm_image.errors import CheckpointError, GlmImageError, shown

MAX_JSON_BYTES = 4 * 2**20
"""Of a config or an index of weight files; the published ones have less than 100 kB."""

MAX_TOKENIZER_BYTES = 64 * 2**20
"""Of a file that a tokenizer or an image processor is read from; the published tokenizer.json has 20 MB."""

WEIGHTS_SUFFIX = ".safetensors"


def check_regular(path: Path) -> os.stat_result:
    """Returns the status of a regular file, or of one that a link leads to."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is {_kind(status.st_mode)}; allowed: a regular file")
    return status


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a regular file of at most ``most`` bytes."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if len(content) > most:
        raise CheckpointError(f"{path}: has more than {most:,} bytes; allowed: up to so many")
    return content


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object of finite numbers, of at most ``most`` bytes."""
    content = read_bytes(path, most)
    try:
        found = json.loads(content.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: the content is a {type(found).__name__}; allowed: a JSON object")
    return found


def check_tree(folder: Path) -> None:
    """Checks all entries of a component's folder before a library opens some of them.

    Raises:
        CheckpointError: an entry is neither a folder nor a regular file, or a file other than weights is larger than
            ``MAX_TOKENIZER_BYTES``.
    """
    for place, folders, files in os.walk(folder):
        for name in folders:
            if (path := Path(place) / name).is_symlink():
                raise CheckpointError(
                    f"{path}: is a link to a folder; allowed: folders, regular files and links to these files"
                )
        for name in files:
            path = Path(place) / name
            size = check_regular(path).st_size
            if size > MAX_TOKENIZER_BYTES and path.suffix != WEIGHTS_SUFFIX:
                raise CheckpointError(
                    f"{path}: has {size:,} bytes; allowed: up to {MAX_TOKENIZER_BYTES:,} in a file other than weights"
                )


@contextmanager
def read_from(path: Path) -> Iterator[None]:
    """Turns every error of a library that makes something of a checkpoint's file or folder into ``CheckpointError``."""
    try:
        yield
    except GlmImageError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be used: {type(error).__name__}: {error}") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is not finite")
    return value


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no file")

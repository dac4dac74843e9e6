"""The prompts of ``generate --prompts``: a file of text, JSON lines or CSV, one request a row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from glm_image_client.cli.flags import parse_size
from glm_image_client.errors import BadArgumentError, reason_of
from glm_image_client.options import OPTIONS, GenerateOptions

NAMES: Final = [name for name in GenerateOptions.__annotations__ if name in OPTIONS and name != "output_format"]
"""The options that a row may set, besides ``prompt`` and ``size``."""

ALIASES: Final = {
    flag.lstrip("-").replace("-", "_"): name for name in NAMES for flag in OPTIONS[name].input.flags if flag[:2] == "--"
}
"""The names of their flags, by which a row may set them too."""


@dataclass(frozen=True)
class Row:
    """A request of the file: its number, from 1, its prompt, and its options where they differ from the flags."""

    number: int
    prompt: str
    options: Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Reads a file of prompts.

    Raises:
        BadArgumentError: it cannot be read, or a row is malformed; the message names the line.
    """
    readers: dict[str, Callable[[str], Iterator[tuple[int, Mapping[str, Any]]]]] = {
        ".txt": _text_lines,
        ".jsonl": _json_lines,
        ".csv": _csv_rows,
    }
    read = readers.get(path.suffix.lower())
    if read is None:
        raise BadArgumentError(f"--prompts is {str(path)!r}; allowed: a file that ends in {', '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadArgumentError(f"--prompts is {str(path)!r}, which cannot be read: {reason_of(error)}") from error
    rows: list[Row] = []
    for line, values in read(text):
        try:
            prompt, options = _parsed(values)
        except BadArgumentError as error:
            raise BadArgumentError(f"--prompts: line {line} of {str(path)!r}: {error}") from error
        rows.append(Row(len(rows) + 1, prompt, options))
    if not rows:
        raise BadArgumentError(f"--prompts is {str(path)!r}, which has no prompt")
    return rows


def _text_lines(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            yield line, {"prompt": content.rstrip("\r")}


def _json_lines(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except ValueError:
                yield line, {}


def _csv_rows(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise BadArgumentError(f"--prompts: line {reader.line_num}: {error}") from error


def _parsed(values: Any) -> tuple[str, dict[str, Any]]:
    allowed = f"allowed: prompt, size, {', '.join(dict.fromkeys((*ALIASES, *NAMES)))}"
    if not isinstance(values, Mapping) or not isinstance(values.get("prompt"), str):
        raise BadArgumentError(f"the prompt is missing; {allowed}")
    values = {ALIASES.get(name, name): value for name, value in values.items()}
    if unknown := [name for name in values if name not in ("prompt", "size", *NAMES)]:
        raise BadArgumentError(f"{unknown[0]!r} is not known; {allowed}")
    options = {name: _number(name, values[name]) for name in NAMES if values.get(name) is not None}
    if values.get("size") is not None:
        options["width"], options["height"] = parse_size(str(values["size"]))
    return values["prompt"], options


def _number(name: str, value: Any) -> Any:
    """Returns a value of CSV as its option's type; the client checks those of JSON."""
    kinds = get_args(OPTIONS[name].kind)
    if not isinstance(value, str) or not {int, float}.intersection(kinds):
        return value
    try:
        return float(value) if float in kinds else int(value)
    except ValueError:
        raise BadArgumentError(f"{name} is {value!r}; allowed: a number") from None

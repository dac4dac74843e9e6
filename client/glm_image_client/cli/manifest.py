"""The manifest of ``generate --prompts``: one line of JSON for each row that has ended."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from glm_image_client.cli.prompts_file import Row
from glm_image_client.errors import BadArgumentError, GlmImageClientError, reason_of
from glm_image_client.result import SUFFIX_FORMATS, GenerationResult, check_template, format_of

MANIFEST: Final = "manifest.jsonl"


class Manifest:
    """The folder of a batch: its images and the manifest, to which threads may write.

    Args:
        folder: where ``manifest.jsonl`` and the images are.
        template: the name of an image; ``{row}`` is the number of its row.
        options: the options of the flags, which those of a row replace.
    """

    def __init__(self, folder: Path, template: str, options: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        self._template, self._options = template, dict(options)
        self._entries: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    @classmethod
    def at(cls, output: str | None, prompts: Path, options: Mapping[str, Any]) -> Manifest:
        """Returns the manifest of ``-o``: a folder, or a file's name with ``{row}``; None = the name of ``prompts``."""
        named = prompts.with_suffix("") if output is None else Path(output)
        if named.suffix.lower() not in SUFFIX_FORMATS:
            return cls(named, "{row}.png", options)
        if "{row}" not in named.name:
            raise BadArgumentError(
                f"--output is {str(named)!r}; allowed with --prompts: a folder, or a name with {{row}}"
            )
        check_template(named, "{row}")
        return cls(named.parent, named.name, options)

    def begin(self, rows: Sequence[Row], *, resume: bool) -> set[int]:
        """Makes the folder and returns the numbers of the rows whose images it has.

        Raises:
            BadArgumentError: the folder cannot be made, or has a manifest although ``resume`` is False.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not resume:
                raise BadArgumentError(
                    f"--output: {str(self.path)!r} exists; allowed: --resume, or another folder with -o"
                )
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        except (OSError, ValueError) as error:
            if isinstance(error, BadArgumentError):
                raise
            raise BadArgumentError(f"--output: {str(self.folder)!r} cannot be used: {reason_of(error)}") from error
        for line in lines:
            self._read(line)
        by_number = {row.number: row for row in rows}
        self._entries = {
            number: entry
            for number, entry in self._entries.items()
            if number in by_number and self._is_done(by_number[number], entry)
        }
        return set(self._entries)

    def request(self, row: Row) -> dict[str, Any]:
        """Returns the options of a row's request."""
        return {**self._options, **row.options, "output_format": format_of(self._template)}

    def add(self, row: Row, result: GenerationResult) -> None:
        """Saves the images of a row and its line."""
        files = result.save(self.folder / self._template.replace("{row}", f"{row.number:04}"))
        names = [file.name for file in files]
        self._write({**self._head(row), "files": names, "seeds": result.seeds, "metadata": result.metadata.raw})

    def fail(self, row: Row, error: GlmImageClientError) -> None:
        """Writes the line of a row that failed."""
        self._write({**self._head(row), "error": str(error), "kind": type(error).__name__})

    def images(self) -> list[tuple[str, Path]]:
        """Returns the images in the order of the rows, each with a label."""
        return [
            (f"{number}: {entry['prompt']}", self.folder / name)
            for number, entry in sorted(self._entries.items())
            for name in entry["files"]
        ]

    def _head(self, row: Row) -> dict[str, Any]:
        options = {name: value for name, value in self.request(row).items() if value is not None and name != "images"}
        sources = [hashlib.sha256(image).hexdigest() for image in self._options.get("images") or ()]
        return {"row": row.number, "prompt": row.prompt, "options": options, "sources": sources}

    def _is_done(self, row: Row, entry: Mapping[str, Any]) -> bool:
        files = entry.get("files", ())
        is_same = all(entry.get(name) == value for name, value in self._head(row).items())
        return bool(files) and is_same and all((self.folder / name).is_file() for name in files)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            self._entries[entry["row"]] = entry
        except (ValueError, LookupError, TypeError):
            pass  # a line that was cut off: its row is generated again

    def _write(self, entry: dict[str, Any]) -> None:
        with self._lock:
            if "files" in entry:
                self._entries[entry["row"]] = entry
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            except OSError as error:
                raise BadArgumentError(f"{str(self.path)!r} cannot be written: {reason_of(error)}") from error

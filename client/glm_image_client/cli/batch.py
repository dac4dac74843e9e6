"""``generate --prompts``: a request for each row of a file, a manifest of what came of them, and a contact sheet."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from glm_image_client.cli.contact_sheet import write_contact_sheet
from glm_image_client.cli.exits import exit_code_of, flag_message
from glm_image_client.cli.manifest import Manifest
from glm_image_client.cli.progress import progress_bar
from glm_image_client.cli.prompts_file import Row, read_rows
from glm_image_client.client import GlmImageClient
from glm_image_client.core import CONCURRENT_CALLS
from glm_image_client.errors import BadArgumentError, GlmImageClientError, UnreachableError, printable

CONTACT_SHEET: Final = "contact_sheet.png"


@dataclass(frozen=True)
class PromptsFile:
    """Many prompts in one command."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A request for each row of a .txt, .jsonl or .csv file. Images, manifest.jsonl and contact_sheet.png "
            "go to the folder -o; default: FILE without its suffix.",
        ),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="With --prompts: skip the rows whose images the manifest has.")
    ] = False

    def check(self, prompt: str | None, offline: bool) -> None:
        """Raises BadArgumentError for arguments that do not go together."""
        if self.prompts is None and self.resume:
            raise BadArgumentError("--resume needs --prompts FILE")
        if self.prompts is not None and prompt is not None:
            raise BadArgumentError(f"PROMPT is {prompt!r}, and --prompts is given too; allowed: one of them")
        if self.prompts is not None and offline:
            raise BadArgumentError("--prompts needs a server; allowed: --prompts without --offline")


def generate_batch(
    client: GlmImageClient, path: Path, output: str | None, options: Mapping[str, Any], *, resume: bool, as_json: bool
) -> None:
    """Generates the images of all rows of a file; a row that fails does not stop the others.

    Raises:
        BadArgumentError: the file or the folder is refused; no request was sent.
        typer.Exit: with the exit code of the first error, if a row failed.
    """
    rows = read_rows(path)
    manifest = Manifest.at(output, path, {name: value for name, value in options.items() if name != "request_id"})
    done = manifest.begin(rows, resume=resume)
    left = [row for row in rows if row.number not in done]
    batch = Batch(client, manifest, options.get("request_id"))
    with progress_bar("generating", shown=not as_json and sys.stderr.isatty()) as bar:
        bar.update(bar.task_ids[0], total=len(left))
        batch.send(left, lambda: bar.advance(bar.task_ids[0]))
    sheet = write_contact_sheet(manifest.folder / CONTACT_SHEET, manifest.images())
    _report(batch, manifest, sheet, len(rows), len(done), as_json)
    if batch.errors:
        raise typer.Exit(exit_code_of(batch.errors[min(batch.errors)]))


class Batch:
    """The requests of a batch, ``CONCURRENT_CALLS`` of them together; ``errors`` has those of the rows that failed."""

    def __init__(self, client: GlmImageClient, manifest: Manifest, request_id: str | None) -> None:
        self._client, self._manifest = client, manifest
        self._id = uuid.uuid4().hex if request_id is None else request_id
        self._running: dict[Future[None], Row] = {}
        self.errors: dict[int, GlmImageClientError] = {}
        self.unsent = 0

    def send(self, rows: Sequence[Row], on_end: Any) -> None:
        """Sends the rows until they have all ended; once the server is lost, no further one."""
        waiting = list(reversed(rows))
        with ThreadPoolExecutor(CONCURRENT_CALLS) as pool:
            try:
                while self._running or (waiting and not self._is_lost()):
                    while waiting and len(self._running) < CONCURRENT_CALLS and not self._is_lost():
                        row = waiting.pop()
                        self._running[pool.submit(self._generate, row)] = row
                    for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                        self._end(self._running.pop(future), future)
                        on_end()
            except KeyboardInterrupt:
                for row in self._running.values():
                    with suppress(GlmImageClientError):
                        self._client.cancel(self._request_id(row))
                raise
        self.unsent = len(waiting)

    def _generate(self, row: Row) -> None:
        request = {**self._manifest.request(row), "request_id": self._request_id(row)}
        self._manifest.add(row, self._client.generate(row.prompt, **request))

    def _end(self, row: Row, future: Future[None]) -> None:
        try:
            future.result()
        except GlmImageClientError as error:
            self.errors[row.number] = error
            self._manifest.fail(row, error)

    def _request_id(self, row: Row) -> str:
        return f"{self._id}-{row.number}"

    def _is_lost(self) -> bool:
        return any(isinstance(error, UnreachableError) for error in self.errors.values())


def _report(batch: Batch, manifest: Manifest, sheet: Path | None, total: int, skipped: int, as_json: bool) -> None:
    made = total - skipped - len(batch.errors) - batch.unsent
    if as_json:
        counts = {"made": made, "skipped": skipped, "failed": len(batch.errors), "unsent": batch.unsent}
        print(json.dumps({"manifest": str(manifest.path), "contact_sheet": sheet and str(sheet), **counts}))
        return
    for number, error in sorted(batch.errors.items()):
        print(printable(f"glm-image: prompt {number}: {flag_message(str(error))}"), file=sys.stderr)
    if batch.unsent:
        print(f"glm-image: {batch.unsent} prompts were not sent; continue with --resume", file=sys.stderr)
    before = f", {skipped} before" if skipped else ""
    print(*[str(file) for file in (manifest.path, sheet) if file is not None], sep="\n")
    print(f"{made} of {total} prompts done{before}, {len(batch.errors)} failed")

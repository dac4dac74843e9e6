"""Follows a stream for the command: a progress bar and intermediate images."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from glm_image_client.errors import BadArgumentError, ServerFailure
from glm_image_client.events import StreamEvent
from glm_image_client.result import GenerationResult
from glm_image_client.terminal import protocol_of, shown

STAGES: Final[Mapping[str, str]] = {
    "ar_queue": "queued",
    "prefill": "prefill",
    "decode": "decoding tokens",
    "dit_queue": "queued for denoising",
    "condition": "conditioning",
    "denoise": "denoising",
    "vae": "decoding the image",
    "encode": "encoding",
}
COLUMNS: Final = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.fields[step]}"),
    TimeElapsedColumn(),
    TextColumn("{task.fields[eta]}"),
)


def shows_images(preview_dir: Path | None) -> bool:
    """Returns whether intermediate images are written or shown."""
    return preview_dir is not None or (sys.stderr.isatty() and protocol_of(os.environ) is not None)


def watch(events: Iterable[StreamEvent], *, has_bar: bool, preview_dir: Path | None) -> GenerationResult:
    """Follows a stream to its end and returns the images.

    Args:
        events: the events of ``stream()``.
        has_bar: whether standard error gets a progress bar, and intermediate images if its terminal can show them.
        preview_dir: folder for intermediate images, named ``NN_KIND.png``.

    Raises:
        BadArgumentError: an image cannot be written.
        GlmImageClientError: as ``GlmImageClient.generate``.
    """
    protocol = protocol_of(os.environ) if has_bar else None
    written = 0
    with Progress(*COLUMNS, console=Console(stderr=True), transient=True, disable=not has_bar) as bar:
        task = bar.add_task("sending", total=None, step="", eta="")
        for event in events:
            if event.result is not None:
                return event.result
            bar.update(
                task,
                description=STAGES.get(event.stage, event.stage),
                completed=event.done,
                total=event.total,
                step=f"{event.done}/{event.total}",
                eta="" if event.eta is None else f"{event.eta:.0f} s left",
            )
            for file in event.files:
                if preview_dir is not None:
                    _write(preview_dir / f"{written:02}_{event.kind}.png", file)
                if protocol is not None and event.kind == "preview":
                    bar.console.out(shown(file, protocol), highlight=False, end="")
                written += 1
    raise ServerFailure("the server ended the stream before it sent the images")


def _write(path: Path, file: bytes) -> None:
    try:
        path.write_bytes(file)
    except OSError as error:
        raise BadArgumentError(f"--preview-dir {str(path.parent)!r} cannot be written: {error.strerror}") from error

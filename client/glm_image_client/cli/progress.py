"""The progress of the command in a terminal: a bar, and intermediate images."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from glm_image_client.events import StreamEvent
from glm_image_client.result import GenerationResult, write_file

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
ITERM2_PROGRAMS: Final = {"iTerm.app", "WezTerm", "mintty"}
KITTY_PROGRAMS: Final = {"ghostty", "kitty"}
KITTY_CHUNK: Final = 4096
IMAGE_COLUMNS: Final = 32

ImageProtocol = Literal["iterm2", "kitty"]


def progress_bar(description: str, *, shown: bool) -> Progress:
    """Returns a bar on standard error with one task, whose fields ``step`` and ``eta`` are shown at its end."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[step]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    )
    bar.add_task(description, total=None, step="", eta="")
    return bar


def shows_images(preview_dir: Path | None) -> bool:
    """Returns whether intermediate images are written or shown."""
    return preview_dir is not None or (sys.stderr.isatty() and image_protocol(os.environ) is not None)


class Watched(NamedTuple):
    """A stream that has ended: its result and the kinds of its events."""

    result: GenerationResult
    kinds: frozenset[str]


def watch(events: Iterable[StreamEvent], *, has_bar: bool, preview_dir: Path | None) -> Watched:
    """Follows ``stream()`` to its end.

    With ``has_bar`` standard error gets a progress bar, and intermediate images if its terminal can show them.
    ``preview_dir`` gets intermediate images, named ``NN_KIND.png``.
    """
    protocol = image_protocol(os.environ) if has_bar else None
    written = 0
    kinds = set[str]()
    with progress_bar("sending", shown=has_bar) as bar:
        for event in events:
            if event.result is not None:
                return Watched(event.result, frozenset(kinds))
            bar.update(
                bar.task_ids[0],
                description=STAGES.get(event.stage, event.stage),
                completed=event.done,
                total=event.total,
                step=f"{event.done}/{event.total}",
                eta="" if event.eta is None else f"{event.eta:.0f} s left",
            )
            kinds.add(event.kind)
            if event.kind == "preview_skipped" and (preview_dir is not None or protocol is not None):
                bar.console.out(f"no preview ({event.reason}): {event.message}", highlight=False)
            for file in event.files:
                if preview_dir is not None:
                    write_file(preview_dir / f"{written:02}_{event.kind}.png", file)
                if protocol is not None and event.kind == "preview":
                    bar.console.out(inline_image(file, protocol), highlight=False, end="")
                written += 1
    raise AssertionError("a stream ends with the images or an error")


def image_protocol(environment: Mapping[str, str]) -> ImageProtocol | None:
    """Returns the inline image protocol of the terminal that an environment describes; None = none is known."""
    if environment.get("TMUX") or environment.get("STY"):  # these forward neither protocol
        return None
    program = environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") == "xterm-kitty" or program in KITTY_PROGRAMS:
        return "kitty"
    if program in ITERM2_PROGRAMS or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return None


def inline_image(png: bytes, protocol: ImageProtocol) -> str:
    """Returns the escape sequence that shows a PNG file ``IMAGE_COLUMNS`` wide, and a new line.

    As in https://iterm2.com/documentation-images.html and https://sw.kovidgoyal.net/kitty/graphics-protocol.
    """
    text = base64.b64encode(png).decode()
    if protocol == "iterm2":
        return f"\033]1337;File=inline=1;size={len(png)};width={IMAGE_COLUMNS};preserveAspectRatio=1:{text}\a\n"
    return "".join(_kitty_parts(text)) + "\n"


def _kitty_parts(text: str) -> Iterator[str]:
    for begin in range(0, len(text), KITTY_CHUNK):
        control = f"a=T,f=100,q=2,c={IMAGE_COLUMNS}," if begin == 0 else ""
        more = int(begin + KITTY_CHUNK < len(text))
        yield f"\033_G{control}m={more};{text[begin : begin + KITTY_CHUNK]}\033\\"

"""The command ``glm-image``."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from glm_image_client.calls import OutputFormat
from glm_image_client.client import GlmImageClient
from glm_image_client.errors import BadArgumentError, GlmImageClientError, RefusedError, UnreachableError
from glm_image_client.offline import generate_offline, inspect_checkpoint
from glm_image_client.result import GenerationResult, format_of
from glm_image_client.tensors import source_bytes

EXIT_REFUSED: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_SERVER: Final = 4
EXIT_INTERRUPTED: Final = 130

PREVIEW_EVERY: Final = 10
"""Steps between two pictures of what is being denoised, where they are written."""

DEFAULT_OUTPUT: Final = "output_{width}x{height}.png"

_SIZE: Final = re.compile(r"(\d{1,6})x(\d{1,6})", re.IGNORECASE | re.ASCII)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


class ProtocolChoice(str, Enum):
    """How to talk to the server."""

    grpc = "grpc"
    http = "http"


Url = Annotated[
    str | None,
    typer.Option(envvar="GLM_IMAGE_URL", metavar="HOST:PORT", help="The server; default 127.0.0.1:8001 or :8000."),
]
Protocol = Annotated[ProtocolChoice, typer.Option(help="Where the URL has no scheme.")]


def main() -> NoReturn:
    """The entry point; exits 0 done, 2 refused input, 3 server unreachable, 4 server error, 130 interrupted."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


@app.callback()
def glm_image() -> None:
    """GLM-Image: a prompt becomes a picture."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint; text in quotation marks is lettered.")],
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 and below is off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.")] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help=".png, .jpg, .jpeg or .webp.")
    ] = DEFAULT_OUTPUT,
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A source image; several times.")] = None,
    count: Annotated[int | None, typer.Option("-n", "--num-images", help="Pictures to make.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to letter.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling of image tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sampling of image tokens.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sampling of image tokens.")] = None,
    request_id: Annotated[
        str | None, typer.Option(metavar="ID", help="What `cancel` and `status` will know it by.")
    ] = None,
    url: Url = None,
    protocol: Protocol = ProtocolChoice.grpc,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up after this long.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    streamed: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Follow the request on its way; by default in a terminal."),
    ] = None,
    preview_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where pictures on the way are written; streams.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Run the engines here, without a server.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="What --offline loads.")] = None,
    device: Annotated[str | None, typer.Option(help="Where --offline runs: auto, cpu, cuda:0, npu:0.")] = None,
) -> None:
    """Generates pictures. What is not given is left to the server's defaults."""
    with _exit_codes():
        width, height = _parse_size(size)
        output_format = cast("OutputFormat", format_of(output))
        _check_folder(output)
        _check_offline(offline, checkpoint, device)
        images = [source_bytes(path) for path in image or ()]
        values: dict[str, Any] = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "seed": seed,
            "num_images": count,
            "negative_prompt": negative_prompt,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
        }
        began = time.perf_counter()
        has_bar = not as_json and sys.stderr.isatty()
        if checkpoint is not None:
            with _progress(shown=has_bar):
                result = generate_offline(checkpoint, device or "auto", values, images)
        else:
            values |= {"images": images, "output_format": output_format, "request_id": request_id}
            with GlmImageClient(url, protocol.value, timeout=timeout) as client:
                if has_bar or preview_dir is not None if streamed is None else streamed:
                    result = _stream(client, values, has_bar, preview_dir)
                else:
                    with _progress(shown=has_bar):
                        result = client.generate(**values)
        waited = time.perf_counter() - began
        files = _save(result, output)
        print(_as_json(result, files) if as_json else _as_text(result, files, waited))


def _stream(
    client: GlmImageClient, values: dict[str, Any], has_bar: bool, preview_dir: Path | None
) -> GenerationResult:
    from glm_image_client.watching import wants_pictures, watch  # noqa: PLC0415 - only where there is a stream

    if preview_dir is not None and not preview_dir.is_dir():
        raise BadArgumentError(f"--preview-dir is {str(preview_dir)!r}; allowed: a folder that exists")
    steps = None if wants_pictures(preview_dir) else 0
    every = PREVIEW_EVERY if preview_dir is not None else 0
    return watch(
        client.stream(**values, preview_steps=steps, preview_every=every), has_bar=has_bar, preview_dir=preview_dir
    )


@app.command()
def cancel(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="What the request was sent with.")],
    url: Url = None,
    protocol: Protocol = ProtocolChoice.grpc,
) -> None:
    """Cancels the requests of an id; exits with 2 when the server does not know it."""
    _control("cancel", request_id, url, protocol)


@app.command()
def status(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="What the request was sent with.")],
    url: Url = None,
    protocol: Protocol = ProtocolChoice.grpc,
) -> None:
    """Tells where the requests of an id are; exits with 2 when the server does not know it."""
    _control("status", request_id, url, protocol)


def _control(action: str, request_id: str, url: str | None, protocol: ProtocolChoice) -> None:
    with _exit_codes():
        with GlmImageClient(url, protocol.value) as client:
            told = client.cancel(request_id) if action == "cancel" else client.status(request_id)
        print(json.dumps(told))
        if told["state"] == "unknown":
            raise typer.Exit(EXIT_REFUSED)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, complete or not.")],
    card: Annotated[float | None, typer.Option(metavar="GB", help="Tell what fits a card of this memory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tells what a checkpoint holds, and the memory that serving it takes. Reads no weights."""
    with _exit_codes():
        if card is not None and not (math.isfinite(card) and card > 0):
            raise BadArgumentError(f"--card is {card}; allowed: GB above 0")
        found = inspect_checkpoint(folder)
        print(json.dumps(found.to_json(card)) if as_json else found.to_text(card))


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except GlmImageClientError as error:
        print(f"glm-image: {error}", file=sys.stderr)
        if isinstance(error, (BadArgumentError, RefusedError)):
            raise typer.Exit(EXIT_REFUSED) from error
        raise typer.Exit(EXIT_UNREACHABLE if isinstance(error, UnreachableError) else EXIT_SERVER) from error


@contextmanager
def _progress(*, shown: bool) -> Iterator[None]:
    if not shown:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task("generating", total=None)
        yield


def _parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    found = _SIZE.fullmatch(size)
    if found is None:
        raise BadArgumentError(f"--size is {size!r}; allowed: WIDTHxHEIGHT in pixels, as in 1024x768")
    return int(found[1]), int(found[2])


def _check_folder(output: str) -> None:
    # Before the wait, not after it.
    if not Path(output).parent.is_dir():
        raise BadArgumentError(f"--output is {output!r}; allowed: a file in a folder that exists")


def _check_offline(offline: bool, checkpoint: Path | None, device: str | None) -> None:
    if offline and checkpoint is None:
        raise BadArgumentError("--offline needs --checkpoint DIR")
    if not offline and (checkpoint, device) != (None, None):
        raise BadArgumentError("--checkpoint and --device belong to --offline; a server has its own")


def _save(result: GenerationResult, output: str) -> list[Path]:
    try:
        return result.save(output)
    except OSError as error:
        raise BadArgumentError(f"--output {output!r} cannot be written: {error.strerror}") from error


def _as_json(result: GenerationResult, files: list[Path]) -> str:
    shown = {"files": [str(file) for file in files], "seeds": result.seeds, "metadata": result.metadata.raw}
    return json.dumps(shown)


def _as_text(result: GenerationResult, files: list[Path], waited: float) -> str:
    told = result.metadata
    stages = "".join(f"{name} {seconds:.2f}, " for name, seconds in told.seconds.items())
    seeds = ", ".join(map(str, told.seeds))
    return "\n".join(
        [
            *map(str, files),
            f"{told.width}x{told.height}, {told.steps} steps, seed {seeds}",
            f"seconds: {stages}all in all {waited:.2f}",
        ]
    )

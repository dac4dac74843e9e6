"""The command ``glm-image``."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from glm_image_client.client import GlmImageClient
from glm_image_client.errors import BadArgumentError, GlmImageClientError, RefusedError, UnreachableError
from glm_image_client.offline import generate_offline, inspect_checkpoint
from glm_image_client.options import OPTIONS, PROMPT
from glm_image_client.progress import progress_bar, shows_images, watch
from glm_image_client.result import GenerationResult, format_of
from glm_image_client.sources import source_bytes

EXIT_REFUSED: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_SERVER: Final = 4
EXIT_INTERRUPTED: Final = 130

PREVIEW_EVERY: Final = 10
"""Denoising steps between two images in --preview-dir."""

DEFAULT_OUTPUT: Final = "output_{width}x{height}.png"

_SIZE: Final = re.compile(r"(\d{1,6})x(\d{1,6})", re.IGNORECASE | re.ASCII)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


class ProtocolChoice(str, Enum):
    """``ProtocolName`` as typer reads it."""

    grpc = "grpc"
    http = "http"


Url = Annotated[
    str | None,
    typer.Option(envvar="GLM_IMAGE_URL", metavar="HOST:PORT", help="Server; default 127.0.0.1:8001, over HTTP :8000."),
]
RequestId = Annotated[str, typer.Argument(metavar="ID", help="Id of the requests.")]
Protocol = Annotated[ProtocolChoice, typer.Option(help="Protocol, if the URL has no scheme.")]


def main() -> NoReturn:
    """The entry point; exits 0 done, 2 refused input, 3 server unreachable, 4 server error, 130 interrupted."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


@app.callback()
def glm_image() -> None:
    """GLM-Image: generates images from prompts."""


def with_generate_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Adds to a command the flags that ``glm_image_client.options`` declares; their values go to its ``**options``."""
    declared = signature(command, eval_str=True)
    own = [parameter for parameter in declared.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    flags = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[option.kind, typer.Option(*option.input.flags, help=option.input.help)],
        )
        for name, option in OPTIONS.items()
        if option.input.flags
    ]
    command.__signature__ = declared.replace(parameters=[*own, *flags])  # type: ignore[attr-defined] # typer reads it
    return command


@app.command()
@with_generate_flags
def generate(
    prompt: Annotated[str, typer.Argument(help=PROMPT.help)],
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Image file: .png, .jpg, .jpeg or .webp.")
    ] = DEFAULT_OUTPUT,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Source image; may be given several times.")
    ] = None,
    request_id: Annotated[str | None, typer.Option(metavar="ID", help="Id for `cancel` and `status`.")] = None,
    url: Url = None,
    protocol: Protocol = ProtocolChoice.grpc,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Timeout of the request.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    streamed: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show the progress; the default in a terminal.")
    ] = None,
    preview_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for intermediate images; implies --stream.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Run the engines here, without a server.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint for --offline.")] = None,
    device: Annotated[str | None, typer.Option(help="Device for --offline: auto, cpu, cuda:0, npu:0.")] = None,
    **options: Any,
) -> None:
    """Generates images. Options that are not given have the server's defaults."""
    with _exit_codes():
        width, height = _parse_size(size)
        output_format = format_of(output)
        _check_flags(output, offline, checkpoint, device)
        images = [source_bytes(path) for path in image or ()]
        options |= {"width": width, "height": height}
        began = time.perf_counter()
        has_bar = not as_json and sys.stderr.isatty()
        if checkpoint is not None:
            with progress_bar("generating", shown=has_bar):
                result = generate_offline(
                    checkpoint, "auto" if device is None else device, {"prompt": prompt, **options}, images
                )
        else:
            options |= {"images": images, "output_format": output_format, "request_id": request_id}
            with GlmImageClient(url, protocol.value, timeout=timeout) as client:
                if has_bar or preview_dir is not None if streamed is None else streamed:
                    result = _stream(client, prompt, options, has_bar, preview_dir)
                else:
                    with progress_bar("generating", shown=has_bar):
                        result = client.generate(prompt, **options)
        waited = time.perf_counter() - began
        files = result.save(output)
        names = [str(file) for file in files]
        report = {"files": names, "seeds": result.seeds, "metadata": result.metadata.raw}
        print(json.dumps(report) if as_json else "\n".join([*names, _summary(result, waited)]))


def _stream(
    client: GlmImageClient, prompt: str, options: dict[str, Any], has_bar: bool, preview_dir: Path | None
) -> GenerationResult:
    if preview_dir is not None and not preview_dir.is_dir():
        raise BadArgumentError(f"--preview-dir is {str(preview_dir)!r}; allowed: a folder that exists")
    options["preview_steps"] = None if shows_images(preview_dir) else 0
    options["preview_every"] = PREVIEW_EVERY if preview_dir is not None else 0
    return watch(client.stream(prompt, **options), has_bar=has_bar, preview_dir=preview_dir)


@app.command()
def cancel(request_id: RequestId, url: Url = None, protocol: Protocol = ProtocolChoice.grpc) -> None:
    """Cancels the requests of an id; exits with 2 if the server does not know it."""
    with _exit_codes(), GlmImageClient(url, protocol.value) as client:
        _print_answer(client.cancel(request_id))


@app.command()
def status(request_id: RequestId, url: Url = None, protocol: Protocol = ProtocolChoice.grpc) -> None:
    """Prints the state of the requests of an id; exits with 2 if the server does not know it."""
    with _exit_codes(), GlmImageClient(url, protocol.value) as client:
        _print_answer(client.status(request_id))


def _print_answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer))
    if answer["state"] == "unknown":
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder, complete or not.")],
    card: Annotated[float | None, typer.Option(metavar="GB", help="Memory of a device, to check what fits it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Lists the contents of a checkpoint and the memory it needs. Reads no weights."""
    with _exit_codes():
        if card is not None and not (math.isfinite(card) and card > 0):
            raise BadArgumentError(f"--card is {card}; allowed: a number of GB above 0")
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


def _parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    found = _SIZE.fullmatch(size)
    if found is None:
        raise BadArgumentError(f"--size is {size!r}; allowed: WIDTHxHEIGHT in pixels, as in 1024x768")
    return int(found[1]), int(found[2])


def _check_flags(output: str, offline: bool, checkpoint: Path | None, device: str | None) -> None:
    # Before the request, so that no images are lost.
    if not Path(output).parent.is_dir():
        raise BadArgumentError(f"--output is {output!r}; allowed: a file in a folder that exists")
    if offline and checkpoint is None:
        raise BadArgumentError("--offline needs --checkpoint DIR")
    if not offline and (checkpoint, device) != (None, None):
        raise BadArgumentError("--checkpoint and --device need --offline; a server has its own")


def _summary(result: GenerationResult, waited: float) -> str:
    metadata = result.metadata
    stages = "".join(f"{name} {seconds:.2f}, " for name, seconds in metadata.seconds.items())
    seeds = ", ".join(map(str, metadata.seeds))
    size = f"{metadata.width}x{metadata.height}"
    return f"{size}, {metadata.steps} steps, seed {seeds}\nseconds: {stages}total {waited:.2f}"

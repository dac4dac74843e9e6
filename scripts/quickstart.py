"""Generates one image on this machine: starts a server, sends one request, saves a PNG and stops the server."""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from glm_image.errors import ConfigurationError, GlmImageError, printable
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image.supervisor.gateway import DEFAULT_PORT, Gateway, GatewayError, GatewayFlags
from glm_image.supervisor.restarts import RestartPolicy
from glm_image_client import (
    BadArgumentError,
    GenerateOptions,
    GenerationResult,
    GlmImageClient,
    GlmImageClientError,
    RefusedError,
)
from glm_image_client.cli.running import with_server_defaults

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
TRAINED_CHECKPOINT = REPOSITORY_ROOT / "checkpoints" / "tiny"
RANDOM_CHECKPOINT = REPOSITORY_ROOT / "checkpoints" / "random"
OUTPUT = "output_{width}x{height}.png"
EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130

console = Console(stderr=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quickstart", description="Generates one image with a temporary server.")
    parser.add_argument("prompt", metavar="PROMPT", help="text in quotation marks is rendered in the image")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the built-in tiny checkpoint")
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="width and height in pixels")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same image")
    parser.add_argument("--keep", action="store_true", help="leave the server running until Ctrl-C")
    return parser.parse_args(arguments)


def parse_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, as in 1024x768")
    return int(found[1]), int(found[2])


def tiny_checkpoint() -> Path:
    """Returns the built-in checkpoint, else a random one, which is written again if its scripts changed."""
    if (TRAINED_CHECKPOINT / "model_index.json").is_file():
        return TRAINED_CHECKPOINT
    sources = sorted(Path(__file__).parent.glob("*tiny_checkpoint*.py"))
    fingerprint = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    stamp = RANDOM_CHECKPOINT.with_suffix(".sha256")
    if RANDOM_CHECKPOINT.is_dir() and stamp.is_file() and stamp.read_text() == fingerprint:
        return RANDOM_CHECKPOINT
    with progress("Making the tiny checkpoint"):
        from make_tiny_checkpoint import make_tiny_checkpoint  # noqa: PLC0415 - it imports torch

        RANDOM_CHECKPOINT.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=RANDOM_CHECKPOINT.parent) as folder:
            make_tiny_checkpoint(Path(folder) / "tiny")
            shutil.rmtree(RANDOM_CHECKPOINT, ignore_errors=True)
            (Path(folder) / "tiny").rename(RANDOM_CHECKPOINT)
        stamp.write_text(fingerprint)
    return RANDOM_CHECKPOINT


@contextmanager
def progress(activity: str) -> Iterator[None]:
    """Shows a spinner with the elapsed time on a terminal, else prints one line."""
    if not console.is_terminal:
        console.print(f"{activity} ...")
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(activity, total=1)
        yield
        bar.update(task, completed=1)


def options_of(arguments: argparse.Namespace) -> GenerateOptions:
    """Returns the options of the request; None where the checkpoint's default applies."""
    width, height = (None, None) if arguments.size is None else arguments.size
    return {"width": width, "height": height, "num_inference_steps": arguments.steps, "seed": arguments.seed}


def generate(server: TritonServer, arguments: argparse.Namespace) -> GenerationResult:
    with GlmImageClient(server.grpc_url) as client:
        options = with_server_defaults(client, options_of(arguments))
        with progress(f"Generating {options['width']} x {options['height']} pixels"):
            return client.generate(arguments.prompt, **options)


def summary(result: GenerationResult, files: list[Path]) -> str:
    """Returns the files with their sizes and seeds, and the seconds of every phase."""
    metadata = result.metadata
    lines = [
        f"{file.resolve()}  ({metadata.width} x {metadata.height}, seed {seed}, {metadata.steps} steps)"
        for file, seed in zip(files, result.seeds, strict=True)
    ]
    return "\n".join([*lines, *(f"  {stage:<10} {seconds:8.3f} s" for stage, seconds in metadata.seconds.items())])


def keep(server: TritonServer) -> None:
    """Leaves the server running until Ctrl-C, or until it exits."""
    installed = Path(sys.executable).with_name("glm-image")
    command = installed if installed.exists() else "glm-image"
    print(f"ready: http://{server.http_url} grpc://{server.grpc_url}")
    print(f"another image: {command} generate PROMPT --url {server.grpc_url}    (Ctrl-C stops the server)", flush=True)
    gateway = Gateway("127.0.0.1", gateway_port(), 1, RestartPolicy(), lambda: None, console.print)
    try:
        gateway.start(server.grpc_url)
        print(f"gateway: {gateway.url}    (OpenAI's API: {gateway.url}/v1)", flush=True)
    except GatewayError as error:  # the server is useful without it
        console.print(f"no gateway: {error}")
    try:
        server.wait()
    finally:
        gateway.stop()


def gateway_port() -> int:
    """Returns the gateway's usual port, or 0, any other one, if it is taken."""
    try:
        GatewayFlags(DEFAULT_PORT).check("127.0.0.1")
    except ConfigurationError:
        return 0
    return DEFAULT_PORT


def run(arguments: argparse.Namespace) -> None:
    checkpoint = tiny_checkpoint() if arguments.checkpoint is None else arguments.checkpoint
    server = TritonServer(ServerSettings(checkpoint))
    try:
        with progress("Starting Triton and loading the models"):
            server.start()
            server.wait_ready()
        result = generate(server, arguments)
        print(summary(result, result.save(OUTPUT)), flush=True)
        if arguments.keep:
            keep(server)
    finally:
        with progress("Stopping Triton"):
            server.stop()


def main() -> int:
    arguments = parse_arguments()
    # All act as Ctrl-C, also for background jobs of a shell, which ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    began = time.perf_counter()
    try:
        run(arguments)
    except KeyboardInterrupt:
        return 0 if arguments.keep else EXIT_INTERRUPTED
    except (GlmImageError, GlmImageClientError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return EXIT_REFUSED if isinstance(error, (BadArgumentError, RefusedError)) else EXIT_FAILED
    console.print(f"{time.perf_counter() - began:.1f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())

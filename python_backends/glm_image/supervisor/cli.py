"""``serve``: a server in the foreground, from its flags to its last trace."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from glm_image.errors import GlmImageError
from glm_image.supervisor.access import CLOSABLE_APIS
from glm_image.supervisor.server import ServerStartError, TritonServer
from glm_image.supervisor.settings import ServerSettings

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2
FIRST_SIGNAL_CODE = 128


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags; an unknown one ends the process with code 2."""
    parser = argparse.ArgumentParser(prog="serve", description="Serves a GLM-Image checkpoint with NVIDIA Triton.")
    defaults = ServerSettings
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="folder with model_index.json")
    parser.add_argument("--profile", metavar="NAME", help="a file of a model's configs folder, without .pbtxt")
    parser.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    for kind in ("http", "grpc", "metrics"):
        flag = f"--{kind}-port"
        default = getattr(defaults, f"{kind}_port")
        parser.add_argument(
            flag, default=default, type=int, metavar="PORT", help="default: %(default)s; 0: any free one"
        )
    parser.add_argument(
        "--drain-seconds",
        default=defaults.drain_seconds,
        type=int,
        metavar="N",
        help="how long requests in flight may go on after a stop (default: %(default)s)",
    )
    parser.add_argument(
        "--open-apis",
        type=lambda names: tuple(names.split(",")),
        metavar="NAME,...",
        help=f"of {', '.join(CLOSABLE_APIS)}, which are closed (default: none)",
    )
    parser.add_argument(
        "--max-request-bytes",
        default=defaults.max_request_bytes,
        type=int,
        metavar="N",
        help="largest body of an HTTP request, where Triton has such a limit (default: %(default)s)",
    )
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="default: the checkout's model_repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM, or until the server ends; returns the exit code."""
    flags = parse_arguments(arguments)
    try:
        server = TritonServer(**vars(flags), log=sys.stderr)
    except GlmImageError as error:
        return _fail(str(error), EXIT_REFUSED)
    _stop_on_signals(server)
    if server.exposure:
        print(f"warning: {server.exposure}", file=sys.stderr, flush=True)
    try:
        server.start()
        server.wait_ready()
    except ServerStartError as error:
        asked_to_stop = server.stop_requested
        server.kill()
        return EXIT_DONE if asked_to_stop else _fail(str(error), EXIT_FAILED)
    print(f"ready: http://{server.http_url} grpc://{server.grpc_url}", flush=True)
    code = server.wait()
    return EXIT_DONE if server.stop_requested else _fail(f"tritonserver ended by itself, {_told(code)}", EXIT_FAILED)


def _stop_on_signals(server: TritonServer) -> None:
    """The first SIGINT or SIGTERM stops the server, the second kills it."""

    def handle(*_: object) -> None:
        if server.stop_requested:
            server.request_kill()
        else:
            server.request_stop()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def _told(code: int) -> str:
    """An exit code in words: ``128 + n`` is the end by signal n."""
    if code > FIRST_SIGNAL_CODE and code - FIRST_SIGNAL_CODE in set(signal.Signals):
        return f"by {signal.Signals(code - FIRST_SIGNAL_CODE).name}"
    return f"with exit code {code}"


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code

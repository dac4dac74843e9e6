"""``serve``: a server in the foreground, from its flags to its last trace."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from glm_image.errors import GlmImageError
from glm_image.supervisor.api_access import CLOSABLE_APIS
from glm_image.supervisor.restarts import CrashLoopError, RestartPolicy, keep_running
from glm_image.supervisor.server import ServerStartError, TritonServer
from glm_image.supervisor.settings import ServerSettings

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_CRASHED = 0, 1, 2, 3


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
    parser.add_argument(
        "--max-restarts",
        default=RestartPolicy.max_restarts,
        type=int,
        metavar="N",
        help="how often in a row a server that breaks is started again (default: %(default)s)",
    )
    parser.add_argument(
        "--request-log",
        type=Path,
        metavar="FILE",
        help="where request lines go (default: standard error, with the log)",
    )
    parser.add_argument(
        "--log-prompts", action="store_true", help="request lines hold prompts, and what refusals quote"
    )
    parser.add_argument(
        "--otlp-traces-endpoint", metavar="URL", help="OpenTelemetry collector, as http://127.0.0.1:4318/v1/traces"
    )
    parser.add_argument(
        "--trace-rate",
        default=defaults.trace_rate,
        type=int,
        metavar="N",
        help="one request of N is traced (default: %(default)s)",
    )
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="default: the checkout's model_repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM, or until the server breaks too often; returns the exit code."""
    flags = vars(parse_arguments(arguments))
    try:
        policy = RestartPolicy(flags.pop("max_restarts"))
        server = TritonServer(**flags, log=sys.stderr)
    except GlmImageError as error:
        return _fail(str(error), EXIT_REFUSED)
    _stop_on_signals(server)
    if server.exposure:
        print(f"warning: {server.exposure}", file=sys.stderr, flush=True)
    try:
        keep_running(server, policy, lambda: _tell_ready(server), _say)
    except ServerStartError as error:
        return _fail(str(error), EXIT_FAILED)
    except CrashLoopError as error:
        return _fail(str(error), EXIT_CRASHED)
    return EXIT_DONE


def _tell_ready(server: TritonServer) -> None:
    print(f"ready: http://{server.http_url} grpc://{server.grpc_url}", flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop_on_signals(server: TritonServer) -> None:
    """The first SIGINT or SIGTERM stops the server, the second kills it."""

    def handle(*_: object) -> None:
        if server.stop_requested:
            server.request_kill()
        else:
            server.request_stop()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code

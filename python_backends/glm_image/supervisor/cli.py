"""``serve``: runs a server in the foreground until a signal stops it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from glm_image.errors import GlmImageError, printable
from glm_image.supervisor.flags import add_flags
from glm_image.supervisor.restarts import CrashLoopError, RestartPolicy, keep_running
from glm_image.supervisor.server import ServerStartError, TritonServer
from glm_image.supervisor.settings import ServerSettings

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_CRASHED = 0, 1, 2, 3


def parse_arguments(arguments: Sequence[str] | None = None, program: str = "serve") -> argparse.Namespace:
    """Parses the flags of ``serve``; an unknown one ends the process with code 2."""
    parser = argparse.ArgumentParser(prog=program, description="Serves a GLM-Image checkpoint with NVIDIA Triton.")
    add_flags(parser, ServerSettings)
    add_flags(parser, RestartPolicy)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, program: str = "serve") -> int:
    """Serves until SIGINT or SIGTERM, or until the server breaks too often; returns the exit code.

    ``program`` is the command's name in its help.
    """
    flags = {name: value for name, value in vars(parse_arguments(arguments, program)).items() if value is not None}
    try:
        policy = RestartPolicy(flags.pop("max_restarts"))
        server = TritonServer(ServerSettings(**flags), log=sys.stderr)
    except GlmImageError as error:
        return _fail(error, EXIT_REFUSED)
    _stop_on_signals(server)
    if server.exposure:
        _print_error(f"warning: {server.exposure}")
    try:
        keep_running(server, policy, lambda: _print_ready(server), _print_error)
    except ServerStartError as error:
        return _fail(error, EXIT_FAILED)
    except CrashLoopError as error:
        return _fail(error, EXIT_CRASHED)
    return EXIT_DONE


def _print_ready(server: TritonServer) -> None:
    print(f"ready: http://{server.http_url} grpc://{server.grpc_url}", flush=True)


def _print_error(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _fail(error: GlmImageError, code: int) -> int:
    _print_error(f"error: {error}")
    return code


def _stop_on_signals(server: TritonServer) -> None:
    """The first SIGINT or SIGTERM stops the server, the second kills it."""

    def handle(*_: object) -> None:
        if server.stop_requested:
            server.request_kill()
        else:
            server.request_stop()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)

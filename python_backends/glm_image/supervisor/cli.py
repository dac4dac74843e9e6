"""``serve``: runs a server in the foreground until a signal stops it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from glm_image.errors import GlmImageError, printable
from glm_image.supervisor.flags import add_flags
from glm_image.supervisor.output import Output
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
    """Serves until SIGINT, SIGTERM or SIGHUP, or until the server breaks too often; returns the exit code.

    ``program`` is the command's name in its help.
    """
    out, log = Output(sys.stdout), Output(sys.stderr)
    try:
        return _serve(parse_arguments(arguments, program), out, log)
    finally:
        out.flush()
        log.flush()


def _serve(arguments: argparse.Namespace, out: Output, log: Output) -> int:
    flags = {name: value for name, value in vars(arguments).items() if value is not None}
    try:
        policy = RestartPolicy(flags.pop("max_restarts"))
        server = TritonServer(ServerSettings(**flags), log=log)
    except GlmImageError as error:
        return _fail(log, error, EXIT_REFUSED)
    _stop_on_signals(server)
    for warning in server.warnings:
        log.put(printable(f"warning: {warning}"))

    def announce() -> None:
        out.put(f"ready: http://{server.http_url} grpc://{server.grpc_url}")

    try:
        keep_running(server, policy, announce, lambda line: log.put(printable(line)))
    except ServerStartError as error:
        return _fail(log, error, EXIT_FAILED)
    except CrashLoopError as error:
        return _fail(log, error, EXIT_CRASHED)
    return EXIT_DONE


def _fail(log: Output, error: GlmImageError, code: int) -> int:
    log.put(printable(f"error: {error}"))
    return code


def _stop_on_signals(server: TritonServer) -> None:
    """The first SIGINT, SIGTERM or SIGHUP stops the server, the second kills it."""

    def handle(*_: object) -> None:
        if server.stop_requested:
            server.request_kill()
        else:
            server.request_stop()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup, which outlives its terminal
        signal.signal(signal.SIGHUP, handle)

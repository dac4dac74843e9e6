"""``serve``: runs a server in the foreground until a signal stops it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from glm_image.errors import GlmImageError, printable
from glm_image.supervisor.flags import add_flags
from glm_image.supervisor.gateway import Gateway, GatewayError, GatewayFlags
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
    add_flags(parser, GatewayFlags)
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
        gateway_flags = GatewayFlags(flags.pop("gateway", None))
        settings = ServerSettings(**flags)
        gateway_flags.check(settings.host, uses_tls=settings.tls.is_used)
        server = TritonServer(settings, log=log)
    except GlmImageError as error:
        return _fail(log, error, EXIT_REFUSED)
    gateway: Gateway | None = None
    if gateway_flags.gateway is not None:
        # Triton stops when the gateway has sent its last answer.
        gateway = Gateway(
            settings.host, gateway_flags.gateway, settings.drain_seconds, policy, server.request_stop, log.put
        )
    _stop_on_signals(server, gateway)
    for warning in server.warnings:
        log.put(printable(f"warning: {warning}"))
    return _run(server, gateway, policy, out, log)


def _run(server: TritonServer, gateway: Gateway | None, policy: RestartPolicy, out: Output, log: Output) -> int:
    def on_ready() -> None:
        out.put(f"ready: http://{server.http_url} {server.grpc_scheme}://{server.grpc_url}")
        if gateway is not None and not gateway.is_running:
            gateway.start(server.local_grpc_url)
            out.put(f"gateway: {gateway.url}")

    try:
        keep_running(server, policy, on_ready, lambda line: log.put(printable(line)))
    except ServerStartError as error:
        return _fail(log, error, EXIT_FAILED)
    except GatewayError as error:
        server.stop()
        return _fail(log, error, EXIT_FAILED)
    except CrashLoopError as error:
        return _fail(log, error, EXIT_CRASHED)
    finally:
        if gateway is not None:
            gateway.stop()
    if gateway is not None and gateway.failure is not None:
        return _fail(log, gateway.failure, EXIT_CRASHED)
    return EXIT_DONE


def _fail(log: Output, error: GlmImageError, code: int) -> int:
    log.put(printable(f"error: {error}"))
    return code


def _stop_on_signals(server: TritonServer, gateway: Gateway | None) -> None:
    """The first SIGINT, SIGTERM or SIGHUP stops the gateway and then the server, the second kills both."""
    is_stopping = False

    def handle(*_: object) -> None:
        nonlocal is_stopping
        if is_stopping or server.stop_requested:
            if gateway is not None:
                gateway.request_kill()
            server.request_kill()
        elif gateway is not None and gateway.is_running:
            gateway.request_stop()
        else:
            server.request_stop()
        is_stopping = True

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup, which outlives its terminal
        signal.signal(signal.SIGHUP, handle)

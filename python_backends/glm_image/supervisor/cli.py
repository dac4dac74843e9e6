"""``serve``: runs a server in the foreground until a signal stops it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from glm_image.errors import GlmImageError, printable
from glm_image.supervisor.flags import add_flags
from glm_image.supervisor.gateway import Gateway, GatewayError, GatewayFlags
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
    """Serves until SIGINT or SIGTERM, or until the server breaks too often; returns the exit code.

    ``program`` is the command's name in its help.
    """
    flags = {name: value for name, value in vars(parse_arguments(arguments, program)).items() if value is not None}
    try:
        policy = RestartPolicy(flags.pop("max_restarts"))
        gateway_flags = GatewayFlags(flags.pop("gateway", None))
        settings = ServerSettings(**flags)
        gateway_flags.check(settings.host)
        server = TritonServer(settings, log=sys.stderr)
    except GlmImageError as error:
        return _fail(error, EXIT_REFUSED)
    gateway = _gateway(server, settings, gateway_flags, policy)
    _stop_on_signals(server, gateway)
    if server.exposure:
        _print_error(f"warning: {server.exposure}")
    try:
        keep_running(server, policy, lambda: _on_ready(server, gateway), _print_error)
    except ServerStartError as error:
        return _fail(error, EXIT_FAILED)
    except GatewayError as error:
        server.stop()
        return _fail(error, EXIT_FAILED)
    except CrashLoopError as error:
        return _fail(error, EXIT_CRASHED)
    finally:
        if gateway is not None:
            gateway.stop()
    if gateway is not None and gateway.failure is not None:
        return _fail(gateway.failure, EXIT_CRASHED)
    return EXIT_DONE


def _gateway(
    server: TritonServer, settings: ServerSettings, flags: GatewayFlags, policy: RestartPolicy
) -> Gateway | None:
    if flags.gateway is None:
        return None
    # Triton stops when the gateway has sent its last answer.
    return Gateway(settings.host, flags.gateway, settings.drain_seconds, policy, server.request_stop, _print_error)


def _on_ready(server: TritonServer, gateway: Gateway | None) -> None:
    print(f"ready: http://{server.http_url} grpc://{server.grpc_url}", flush=True)
    if gateway is not None and not gateway.is_running:
        gateway.start(server.local_grpc_url)
        print(f"gateway: {gateway.url}", flush=True)


def _print_error(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _fail(error: GlmImageError, code: int) -> int:
    _print_error(f"error: {error}")
    return code


def _stop_on_signals(server: TritonServer, gateway: Gateway | None) -> None:
    """The first SIGINT or SIGTERM stops the gateway and then the server, the second kills both."""
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

"""``fleet``: runs pools of stages, Envoy and a gateway in the foreground until a signal stops them."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from glm_image.errors import GlmImageError, printable
from glm_image.supervisor.output import Output
from local_fleet.fleet import FleetSettings, LocalFleet

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_REFUSED: Final = 2
CHECK_SECONDS: Final = 0.5


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fleet", description="Serves a checkpoint by pools of stages behind Envoy and a gateway, on this machine."
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", required=True, help="folder with model_index.json")
    parser.add_argument("--ar", type=int, metavar="N", default=1, help="servers of glm_ar (default: %(default)s)")
    parser.add_argument("--dit", type=int, metavar="N", default=2, help="servers of glm_dit (default: %(default)s)")
    parser.add_argument("--no-tls", action="store_true", help="no TLS between Envoy and the servers")
    parser.add_argument(
        "--port", type=int, metavar="PORT", default=8080, help="of the gateway; 0: any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--grpc-port",
        type=int,
        metavar="PORT",
        default=8001,
        help="of the gateway for KServe's protocol; 0: any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=int,
        metavar="N",
        default=60,
        help="time limit for requests in flight after a stop (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a fleet until SIGINT or SIGTERM; returns the exit code."""
    flags = parse_arguments(arguments)
    out, log = Output(sys.stdout), Output(sys.stderr)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stopping.set())
    try:
        settings = FleetSettings(
            flags.checkpoint.absolute(),
            flags.ar,
            flags.dit,
            tls=not flags.no_tls,
            port=flags.port,
            grpc_port=flags.grpc_port,
            drain_seconds=flags.drain_seconds,
        )
        fleet = LocalFleet(settings, lambda line: log.put(printable(line)))
    except GlmImageError as error:
        log.put(printable(f"error: {error}"))
        log.flush()
        return EXIT_REFUSED
    failure: GlmImageError | None = None
    try:
        _run(fleet, stopping, out)
    except GlmImageError as error:
        failure = error
    finally:
        fleet.stop()
        if failure is not None:  # after the last lines of the processes
            log.put(printable(f"error: {failure}"))
        out.flush()
        log.flush()
    return EXIT_DONE if failure is None else EXIT_FAILED


def _run(fleet: LocalFleet, stopping: threading.Event, out: Output) -> None:
    failures: list[Exception] = []
    starting = threading.Thread(target=_start, args=(fleet, stopping, failures), name="start", daemon=True)
    starting.start()
    while starting.is_alive() and not stopping.is_set():
        starting.join(CHECK_SECONDS)
    if not stopping.is_set():
        for line in addresses(fleet):
            out.put(line)
    while not stopping.wait(CHECK_SECONDS) and fleet.failure() is None:
        pass
    if failure := fleet.failure() or next(iter(failures), None):
        raise failure


def _start(fleet: LocalFleet, stopping: threading.Event, failures: list[Exception]) -> None:
    try:
        fleet.start()
    except Exception as error:
        if not stopping.is_set():  # else a stop has ended the processes
            failures.append(error)
            stopping.set()


def addresses(fleet: LocalFleet) -> list[str]:
    """Returns a line for each process: its name, its process id, and where it is reached."""
    lines = [f"{member.name}: {member.address} pid {member.process.pid}" for member in fleet.members.values()]
    lines.append(f"envoy: {fleet.envoy_url} admin {fleet.envoy_admin} pid {fleet.envoy.pid}")
    lines.append(f"gateway: {fleet.url} pid {fleet.gateway.pid}")
    return [*lines, f"ready: {fleet.url} grpc://{fleet.grpc_url}"]

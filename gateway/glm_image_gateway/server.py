"""Runs a gateway in the foreground until a signal stops it, or adds an API key to a file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import grpc
import uvicorn

from glm_image_gateway.app import create_app
from glm_image_gateway.keys import new_key
from glm_image_gateway.kserve.grpc_service import serve_grpc
from glm_image_gateway.logs import start_logging
from glm_image_gateway.memory import keep_freed_memory
from glm_image_gateway.services import Services
from glm_image_gateway.settings import GatewaySettings, SettingsError, parse_settings

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_REFUSED: Final = 2
NEW_KEY: Final = "new-key"
NEW_KEY_ARGUMENTS: Final = 3
IDLE_SECONDS: Final = 75
"""After which an idle connection is closed; longer than the pause of common proxies and clients."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code. ``new-key FILE NAME`` prints a new key instead."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    start_logging()
    keep_freed_memory()
    try:
        if given[:1] == [NEW_KEY]:
            return _print_new_key(given)
        settings = parse_settings(given)
        listener = _listener(settings)
        with contextlib.closing(listener):
            return asyncio.run(serve(settings, listener))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED


async def serve(settings: GatewaySettings, listener: socket.socket) -> int:
    """Serves on a bound socket until a signal; prints ``ready: http://HOST:PORT`` when it listens."""
    services = Services.of(settings)
    server = GatewayServer(services, listener)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.request_stop)
    if settings.stop_at_eof:
        loop.add_reader(sys.stdin.fileno(), _stop_at_eof, loop, server)
    await server.serve([listener])
    return EXIT_DONE if server.started else EXIT_FAILED


class GatewayServer(uvicorn.Server):
    """uvicorn without signal handlers of its own, so that a stop on request ends with code 0."""

    def __init__(self, services: Services, listener: socket.socket) -> None:
        config = uvicorn.Config(
            create_app(services),
            http="h11",  # it limits the size of heads
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=services.settings.drain_seconds,
        )
        super().__init__(config)
        self._services, self._drain_seconds = services, services.settings.drain_seconds
        self._grpc: grpc.aio.Server | None = None
        self.grpc_port: int | None = None
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def request_stop(self) -> None:
        """The first call stops after the requests in flight, the second immediately."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts both services, and prints their addresses.

        Raises:
            SettingsError: the port of gRPC cannot be used.
        """
        settings, front = self._services.settings, self._services.front
        addresses = [self.url]
        if front is not None and settings.grpc_port is not None:
            try:
                limit = settings.max_body_bytes
                self._grpc, self.grpc_port = await serve_grpc(front, settings.host, settings.grpc_port, limit)
            except OSError as error:
                raise SettingsError(f"--grpc-port is {settings.grpc_port}, which cannot be used: {error}") from error
            addresses.append(f"grpc://{self.url.removeprefix('http://').rpartition(':')[0]}:{self.grpc_port}")
        await super().startup(sockets)
        if self.started:
            print(f"ready: {' '.join(addresses)}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends both services after the requests in flight."""
        grpc_stop = self._grpc.stop(self._drain_seconds) if self._grpc is not None else asyncio.sleep(0)
        for server in self.servers:
            server.close()  # both stop listening before either waits
        await grpc_stop
        await super().shutdown(sockets)


def _stop_at_eof(loop: asyncio.AbstractEventLoop, server: GatewayServer) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        server.request_stop()


def _listener(settings: GatewaySettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}") from None
    return listener


def _print_new_key(arguments: Sequence[str]) -> int:
    if len(arguments) != NEW_KEY_ARGUMENTS:
        raise SettingsError("usage: gateway new-key FILE NAME")
    print(new_key(Path(arguments[1]), arguments[2]))
    return EXIT_DONE

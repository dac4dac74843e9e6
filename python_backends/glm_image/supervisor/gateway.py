"""The gateway as a child process of ``serve``, started again when it ends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm_image.errors import ConfigurationError, GlmImageError
from glm_image.supervisor.flags import flag
from glm_image.supervisor.ports import ReservedPorts
from glm_image.supervisor.restarts import RestartPolicy
from glm_image.supervisor.settings import MAX_PORT

PACKAGES = ("glm_image_gateway", "fastapi", "uvicorn")
DEFAULT_PORT = 8080
KILL_SECONDS = 10
"""After the drain, until a gateway that still runs is killed."""


class GatewayError(GlmImageError):
    """A gateway did not start, or ended too often."""


@dataclass(frozen=True)
class GatewayFlags:
    """The flags of ``serve`` about the gateway; its other settings are environment variables."""

    gateway: int | None = flag(
        f"also serve OpenAI's image API, on this port (default: none; without PORT: {DEFAULT_PORT})",
        "PORT",
        int,
        default=None,
        const=DEFAULT_PORT,
    )

    def check(self, host: str, *, uses_tls: bool = False) -> None:
        """Raises ConfigurationError if the gateway is not installed, or cannot use its port or the server's."""
        if self.gateway is None:
            return
        if uses_tls:
            raise ConfigurationError(
                "--gateway is given with --grpc-server-cert, and it connects without TLS; allowed: one of them"
            )
        if any(importlib.util.find_spec(name) is None for name in PACKAGES):
            raise ConfigurationError("--gateway needs packages that are not installed: pip install '.[gateway]'")
        if not 0 <= self.gateway <= MAX_PORT:
            raise ConfigurationError(f"--gateway is {self.gateway}; allowed: 0 (any free one) to {MAX_PORT}")
        ReservedPorts(host, {"--gateway": self.gateway}).release()


class Gateway:
    """A gateway in front of a Triton server, in a process of its own.

    A thread starts it again whenever it ends, on the same port. It also ends when this process dies, since its standard
    input then ends.

    Args:
        host: the address that it listens on.
        port: 0 = any free one.
        drain_seconds: the time limit of requests in flight after a stop.
        policy: how often, and with which pauses, it is started again.
        on_end: called when it has ended for good, on request or not.
        log: gets a line about each restart.
    """

    def __init__(
        self,
        host: str,
        port: int,
        drain_seconds: int,
        policy: RestartPolicy,
        on_end: Callable[[], object],
        log: Callable[[str], object],
    ) -> None:
        self._host, self._port, self._drain_seconds = host, port, drain_seconds
        self._policy, self._on_end, self._log = policy, on_end, log
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._first_start = threading.Event()
        self._stopping = threading.Event()
        self.url: str | None = None
        """``http://HOST:PORT``, once it has started."""
        self.failure: GatewayError | None = None
        """Why it ended without a request to stop."""

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, grpc_url: str) -> None:
        """Starts the gateway and waits until it listens; a later call does nothing.

        Raises:
            GatewayError: it did not start.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_running, args=(grpc_url,), name="gateway", daemon=True)
            self._thread.start()
            self._first_start.wait()
        if self.failure is not None:
            raise self.failure

    def request_stop(self) -> None:
        """Requests a stop after the requests in flight; does not block, safe in a signal handler."""
        self._stopping.set()
        process = self._process
        if process is not None:
            process.terminate()

    def request_kill(self) -> None:
        """Requests an immediate end; does not block, safe in a signal handler."""
        self._stopping.set()
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """Drains and ends the gateway."""
        self.request_stop()
        if self._thread is None:
            return
        self._thread.join(self._drain_seconds + KILL_SECONDS)
        self.request_kill()
        self._thread.join()

    def _keep_running(self, grpc_url: str) -> None:
        restarts = 0
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                code = self._run(grpc_url)
                if self._stopping.is_set():
                    return
                if not self._first_start.is_set():
                    self.failure = GatewayError(f"the gateway did not start: exit code {code}; its log has the reason")
                    return
                if time.monotonic() - started >= self._policy.steady_seconds:
                    restarts = 0
                reason = f"the gateway ended with code {code}"
                if restarts >= self._policy.max_restarts:
                    text = f"{reason}; restarts in a row before: {restarts}, as many as --max-restarts allows"
                    self.failure = GatewayError(text)
                    return
                pause = self._policy.pause(restarts)
                restarts += 1
                self._log(f"gateway restart {restarts} of {self._policy.max_restarts} in {pause:g} s: {reason}")
                self._stopping.wait(pause)
        finally:
            self._first_start.set()
            self._on_end()

    def _run(self, grpc_url: str) -> int:
        """Runs the process until it ends, and returns its exit code."""
        command: list[Any] = [sys.executable, "-m", "glm_image_gateway", "--url", f"grpc://{grpc_url}"]
        command += ["--host", self._host, "--port", self._port, "--drain-seconds", self._drain_seconds, "--stop-at-eof"]
        pipe = subprocess.PIPE
        arguments = [str(word) for word in command]
        # In a session of its own, so that signals of a terminal reach it through this process alone.
        with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
            self._process = process
            if self._stopping.is_set():  # meanwhile
                process.terminate()
            assert process.stdout is not None
            line = process.stdout.readline()
            if line.startswith("ready: "):
                self.url = line.split()[1]
                self._port = int(self.url.rpartition(":")[2])
                self._first_start.set()
            process.wait()
        return process.returncode

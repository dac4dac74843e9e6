"""One tritonserver process under its watchdog: its command line, its log, its end."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import TextIO

from glm_image.errors import printable
from glm_image.ipc import run_directory
from glm_image.supervisor import watchdog
from glm_image.supervisor.api_access import closing_flags
from glm_image.supervisor.installation import Installation
from glm_image.supervisor.ports import listens
from glm_image.supervisor.settings import ServerSettings, models_by_role
from glm_image.supervisor.triton_log import (
    SERVICES,
    start_failure,
    started_service,
    syntax_error,
    unloaded_model,
)

LOG_TAIL_LINES = 200
METRICS_INTERVAL_MS = 250
PORT_CHECK_SECONDS = 0.01
"""The interval at which the ports of a server are looked at, from its log line until it listens: milliseconds."""
SERVER = "tritonserver"
MIN_PING_INTERVAL_MS = 5000
"""Between two pings of a gRPC client. Triton's own is 300 s: clients that ping more often, so that idle connections are
kept, are cut off in the middle of a long request."""
SIGNAL_CODE_BASE = 128
"""Exit codes above it mean the end by a signal."""


class ServerProcess:
    """A running tritonserver; no port of its ``settings`` is 0, and ``restarts`` counts its earlier starts."""

    def __init__(
        self, installation: Installation, settings: ServerSettings, log: TextIO | None, restarts: int = 0
    ) -> None:
        self.shm_prefix = f"glm_image_{secrets.token_hex(8)}_"
        self._run_directory = Path(tempfile.mkdtemp(prefix="glm-image-serve-"))
        self._log = log
        self._ports = settings.ports().values()
        self._tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._syntax_error: str | None = None
        self._changed = threading.Condition()
        self._started: set[str] = set()
        self._failure: str | None = None
        self._ended = False
        self._exit_reason: str | None = None
        self._entry_models, self._stages = models_by_role(settings.model_repository)
        self._drained: set[str] = set()
        self._unloaded: set[str] = set()
        self._next_command: bytes | None = None
        try:
            self._watchdog = self._launch(installation, settings, restarts)
        except BaseException:
            watchdog.remove_leftovers(self.shm_prefix, self._run_directory)
            raise
        self._readers = [
            threading.Thread(target=self._read_log, name="triton-log", daemon=True),
            threading.Thread(target=self._read_reports, name="watchdog-reports", daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def log_tail(self) -> str:
        with self._changed:
            return "".join(self._tail)

    @property
    def returncode(self) -> int | None:
        return self._watchdog.poll()

    @property
    def end_reason(self) -> str:
        with self._changed:
            return self._exit_reason or f"tritonserver ended by itself, {_describe_exit(self._watchdog.wait())}"

    def wait_started(self) -> str | None:
        """Waits until every service listens (None), or until the start has failed; returns the reason."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_failed() or self._started >= SERVICES)
            # Triton logs that a service has started before it binds the port.
            while not self._has_failed() and not self._listens():
                self._changed.wait(PORT_CHECK_SECONDS)
            if self._failure is None and self._ended:
                if self._exit_reason is not None:
                    return self._exit_reason
                lines = [line.strip() for line in self._tail if line.strip()]
                return f"tritonserver ended while starting: {lines[-1] if lines else 'its log is empty'}"
            return self._failure

    def request_watch(self) -> None:
        """Has the server killed when one of its processes breaks; call it when all of them exist."""
        self._send(b"watch\n")

    def request_stop(self) -> None:
        """Requests a stop after the requests in flight; does not block, safe in a signal handler.

        A stopping Triton refuses requests that are between two steps of an ensemble. So the entry models are unloaded
        first, which makes the server unready; after their last response the stages are, concurrently; then Triton is
        stopped. It would unload them itself, but checks only once a second whether they have ended.
        """
        self._next_command = b"unload\n"
        self._send(b"drain\n" if self._entry_models else b"stop\n")

    def request_kill(self) -> None:
        self._send(b"kill\n")

    def wait(self) -> int:
        """Waits for the end and for the last line of the log; returns the exit code."""
        code = self._watchdog.wait()
        for reader in self._readers:
            reader.join()
        # The watchdog has done this, unless it was killed itself.
        watchdog.remove_leftovers(self.shm_prefix, self._run_directory)
        return code

    def _has_failed(self) -> bool:
        return self._ended or self._failure is not None

    def _listens(self) -> bool:
        """Whether the server, and no other process, listens on every port."""
        children = watchdog.children_of(self._watchdog.pid)
        servers = [pid for pid in children if (stat := watchdog.Stat.read(pid)) and stat.name == SERVER]
        return any(listens(pid, self._ports) for pid in servers)

    def _launch(self, installation: Installation, settings: ServerSettings, restarts: int) -> subprocess.Popen[bytes]:
        backends = installation.lay_out_backends(self._run_directory)
        # Triton listens only when all models are loaded; meanwhile `glm-image` finds here that it is starting.
        ports = {"pid": os.getpid(), "ports": list(settings.ports().values())}
        (self._run_directory / "ports.json").write_text(json.dumps(ports))
        return subprocess.Popen(
            [*self._watchdog_command(settings), "--", *self._server_command(installation, settings, backends)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A model's import path begins with the server's working directory, which holds a link to this package.
            cwd=backends / "python",
            env={
                **installation.environment(),
                **settings.model_environment(),
                run_directory.RUN_DIRECTORY_VARIABLE: str(self._run_directory),
                "GLM_IMAGE_RESTARTS": str(restarts),
            },
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which then stops the server
        )

    def _watchdog_command(self, settings: ServerSettings) -> list[str]:
        return [
            *(sys.executable, "-I", "-S", str(Path(watchdog.__file__).resolve())),
            *("--shm-prefix", self.shm_prefix, "--run-directory", str(self._run_directory)),
            *("--drain-seconds", str(settings.drain_seconds)),
        ]

    def _server_command(self, installation: Installation, settings: ServerSettings, backends: Path) -> list[str]:
        return [
            str(installation.binary),
            f"--model-repository={settings.model_repository}",
            f"--backend-directory={backends}",
            f"--cache-directory={installation.caches}",
            *(f"--{service}-address={settings.host}" for service in ("http", "grpc", "metrics")),
            *(f"{flag}={port}" for flag, port in settings.ports().items()),
            "--allow-metrics=true",
            # A stopping server waits for the thread that collects metrics, which sleeps for this interval.
            f"--metrics-interval-ms={METRICS_INTERVAL_MS}",
            f"--exit-timeout-secs={settings.drain_seconds}",
            # For the models' own processes, which unload the entry models; the API is closed to clients.
            "--model-control-mode=explicit",
            "--load-model=*",
            "--disable-auto-complete-config",
            *closing_flags(settings.open_apis),
            *settings.trace_flags(),
            *installation.input_limit_flags(settings.max_request_bytes),
            # Triton would keep the buffers of its largest gRPC requests.
            "--grpc-infer-allocation-pool-size=0",
            f"--grpc-http2-min-recv-ping-interval-without-data={MIN_PING_INTERVAL_MS}",
            "--grpc-keepalive-permit-without-calls=true",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            *([f"--model-config-name={settings.profile}"] if settings.profile else []),
        ]

    def _read_log(self) -> None:
        assert self._watchdog.stderr is not None
        with self._watchdog.stderr as stream:
            for line in stream:
                # Triton writes a line and its end separately, and may end in between.
                self._handle_line(line.decode(errors="replace").removesuffix("\n"))
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read_reports(self) -> None:
        assert self._watchdog.stdout is not None
        with self._watchdog.stdout as stream:
            for line in stream:
                report, _, model = line.decode().strip().partition(" ")
                if report == "drained":
                    with self._changed:
                        self._drained.add(model)
                        self._continue_stop()

    def _handle_line(self, line: str) -> None:
        shown = printable(line, keep="\t") + "\n"
        if self._log is not None:
            with contextlib.suppress(OSError, ValueError):  # its reader may have ended; the server goes on
                self._log.write(shown)
                self._log.flush()
        with self._changed:
            self._tail.append(shown)
            if service := started_service(line):
                self._started.add(service)
            self._syntax_error = syntax_error(line) or self._syntax_error
            self._failure = self._failure or start_failure(line, self._syntax_error)
            if line.startswith(watchdog.EXIT_REASON_PREFIX) and self._exit_reason is None:
                self._exit_reason = line.removeprefix(watchdog.EXIT_REASON_PREFIX).strip()
            if model := unloaded_model(line):
                self._unloaded.add(model)
                self._continue_stop()
            self._changed.notify_all()

    def _continue_stop(self) -> None:
        """Sends the next command of a stop once the models have reached the state that it requires."""
        if self._next_command == b"unload\n" and self._entry_models <= self._drained | self._unloaded:
            self._next_command = b"stop\n"
            self._send(b"unload\n")
        if self._next_command == b"stop\n" and self._entry_models | self._stages <= self._unloaded:
            self._next_command = None
            self._send(b"stop\n")

    def _send(self, command: bytes) -> None:
        assert self._watchdog.stdin is not None
        # Not through the buffered file, which a signal handler must not enter twice.
        with contextlib.suppress(BrokenPipeError):  # the watchdog has ended
            os.write(self._watchdog.stdin.fileno(), command)


def _describe_exit(code: int) -> str:
    """Describes an exit code: both ``128 + n`` and ``-n`` mean the end by signal n."""
    number = -code if code < 0 else code - SIGNAL_CODE_BASE
    if number in set(signal.Signals):
        return f"by {signal.Signals(number).name}"
    return f"with exit code {code}"

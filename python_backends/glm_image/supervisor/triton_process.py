"""One tritonserver process under its watchdog: its command line, its log, its end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from pathlib import Path

from glm_image.errors import printable
from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.supervisor.addresses import service_flags
from glm_image.supervisor.api_access import closing_flags
from glm_image.supervisor.installation import Installation
from glm_image.supervisor.output import Output
from glm_image.supervisor.ports import listens
from glm_image.supervisor.run_directory import RunDirectory, remove_dead
from glm_image.supervisor.settings import ServerSettings, models_by_role
from glm_image.supervisor.triton_log import (
    SERVICES,
    start_failure,
    started_service,
    syntax_error,
    unloaded_model,
)
from glm_image.telemetry.line_writer import leave_signals_to_main_thread
from glm_image.watchdog import __main__ as watchdog_program
from glm_image.watchdog.processes import Stat, children_of
from glm_image.watchdog.watchdog import EXIT_REASON_PREFIX, LAST_LINES_SECONDS, STOP_GRACE_SECONDS

LOG_TAIL_LINES = 200
METRICS_INTERVAL_MS = 250
END_SECONDS = LAST_LINES_SECONDS + 10.0
"""Time for a killed server and its watchdog to end."""
MILLISECONDS = 1000
PORT_CHECK_SECONDS = 0.01
"""The interval at which the ports of a server are looked at, from its log line until it listens: milliseconds."""
SERVER = "tritonserver"
MIN_PING_INTERVAL_MS = 5000
"""Between two pings of a gRPC client. Triton's own is 300 s: clients that ping more often, so that idle connections are
kept, are cut off in the middle of a long request."""
STUB_START_SECONDS = 600
"""Time for a model's process to start. Triton's default, 30 s, is too short on a busy host, and Triton hangs after it:
it waits for the end of a process that is still starting."""
SIGNAL_CODE_BASE = 128
"""Exit codes above it mean the end by a signal."""


class ServerProcess:
    """A running tritonserver; no port of its ``settings`` is 0, and ``restarts`` counts its earlier starts."""

    def __init__(
        self, installation: Installation, settings: ServerSettings, log: Output | None, restarts: int = 0
    ) -> None:
        remove_dead()
        self._run_directory = RunDirectory.create()
        self.shm_prefix = self._run_directory.shm_prefix
        self._log = log
        self._ports = settings.ports().values()
        self._tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._syntax_error: str | None = None
        self._changed = threading.Condition()
        self._started: set[str] = set()
        self._failure: str | None = None
        self._ended = False
        self._exit_reason: str | None = None
        self._entry_models, self._stages = models_by_role(settings.loaded_models())
        self._drained: set[str] = set()
        self._unloaded: set[str] = set()
        self._next_command: bytes | None = None
        self._drain_seconds = settings.drain_seconds
        self._stopping = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._stopping)
        self._deadline = math.inf
        try:
            self._watchdog = self._launch(installation, settings, restarts)
        except BaseException:
            self._run_directory.remove()
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
            failure = self._failure or (self._early_end() if self._ended else None)
        return failure and self._run_directory.with_targets(failure)

    def _early_end(self) -> str:
        if self._exit_reason is not None:
            return self._exit_reason
        lines = [line.strip() for line in self._tail if line.strip()]
        return f"tritonserver ended while starting: {lines[-1] if lines else 'its log is empty'}"

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
        self._end_within(self._drain_seconds + STOP_GRACE_SECONDS + END_SECONDS)
        self._send(b"drain\n" if self._entry_models else b"stop\n")

    def request_kill(self) -> None:
        self._end_within(END_SECONDS)
        self._send(b"kill\n")

    def wait(self) -> int:
        """Waits for the end and for the last line of the log; returns the exit code.

        Once a stop is requested this takes a limited time: a watchdog that does not end then is killed.
        """
        code = self._wait_for_watchdog()
        for reader in self._readers:
            reader.join(END_SECONDS)
        if self._log is not None:
            self._log.flush()
        # The watchdog has done this, unless it was killed itself.
        self._run_directory.remove()
        return code

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        os.eventfd_write(self._stopping, 1)

    def _wait_for_watchdog(self) -> int:
        poll = select.poll()
        poll.register(self._stopping, select.POLLIN)
        try:
            ended = os.pidfd_open(self._watchdog.pid)
        except ProcessLookupError:
            return self._watchdog.wait()
        poll.register(ended, select.POLLIN)
        try:
            while self._watchdog.poll() is None:
                left = self._deadline - time.monotonic()
                if left <= 0:  # its children do not outlive it either
                    self._watchdog.kill()
                    break
                poll.poll(None if left == math.inf else left * MILLISECONDS)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._stopping)
        finally:
            os.close(ended)
        return self._watchdog.wait()

    def _has_failed(self) -> bool:
        return self._ended or self._failure is not None

    def _listens(self) -> bool:
        """Whether the server, and no other process, listens on every port."""
        children = children_of(self._watchdog.pid)
        servers = [pid for pid in children if (stat := Stat.read(pid)) and stat.name == SERVER]
        return any(listens(pid, self._ports) for pid in servers)

    def _launch(self, installation: Installation, settings: ServerSettings, restarts: int) -> subprocess.Popen[bytes]:
        folder = self._run_directory
        backends = installation.lay_out_backends(folder.path)
        # Triton listens only when all models are loaded; meanwhile `glm-image` finds here that it is starting.
        ports = {"pid": os.getpid(), "ports": list(settings.ports().values())}
        (folder.path / "ports.json").write_text(json.dumps(ports))
        return subprocess.Popen(
            [*self._watchdog_command(settings), "--", *self._server_command(installation, settings, backends)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A model's import path begins with the server's working directory, which holds a link to this package.
            cwd=backends / "python",
            env={
                **folder.plain_environment(installation.environment(folder.path, folder.plain)),
                **settings.model_environment(folder.plain),
                RUN_DIRECTORY_VARIABLE: str(folder.path),
                "GLM_IMAGE_RESTARTS": str(restarts),
            },
            pass_fds=(folder.lock,),
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which then stops the server
        )

    def _watchdog_command(self, settings: ServerSettings) -> list[str]:
        return [
            *(sys.executable, "-I", "-S", str(Path(watchdog_program.__file__).resolve())),
            *("--shm-prefix", self.shm_prefix, "--run-directory", str(self._run_directory.path)),
            *("--drain-seconds", str(settings.drain_seconds)),
        ]

    def _server_command(self, installation: Installation, settings: ServerSettings, backends: Path) -> list[str]:
        plain = self._run_directory.plain
        return [
            plain(installation.binary, "tritonserver"),
            f"--model-repository={plain(settings.model_repository, 'models')}",
            f"--backend-directory={backends}",
            f"--cache-directory={plain(installation.caches, 'caches')}",
            *service_flags(settings.host),
            *settings.tls.flags(plain),
            *(f"{flag}={port}" for flag, port in settings.ports().items()),
            "--allow-metrics=true",
            # A stopping server waits for the thread that collects metrics, which sleeps for this interval.
            f"--metrics-interval-ms={METRICS_INTERVAL_MS}",
            f"--exit-timeout-secs={settings.drain_seconds}",
            # For the models' own processes, which unload the entry models; the API is closed to clients.
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in settings.loaded_models()),
            "--disable-auto-complete-config",
            *closing_flags(settings.open_apis),
            *settings.trace_flags(),
            *installation.input_limit_flags(settings.max_request_bytes),
            # Triton would keep the buffers of its largest gRPC requests.
            "--grpc-infer-allocation-pool-size=0",
            f"--grpc-http2-min-recv-ping-interval-without-data={MIN_PING_INTERVAL_MS}",
            "--grpc-keepalive-permit-without-calls=true",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,stub-timeout-seconds={STUB_START_SECONDS}",
            *([f"--model-config-name={settings.profile}"] if settings.profile else []),
        ]

    def _read_log(self) -> None:
        assert self._watchdog.stderr is not None
        leave_signals_to_main_thread()
        with self._watchdog.stderr as stream:
            for line in stream:
                # Triton writes a line and its end separately, and may end in between.
                self._handle_line(line.decode(errors="replace").removesuffix("\n"))
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read_reports(self) -> None:
        assert self._watchdog.stdout is not None
        leave_signals_to_main_thread()
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
            self._log.put(shown.removesuffix("\n"))
        with self._changed:
            self._tail.append(shown)
            if service := started_service(line):
                self._started.add(service)
            self._syntax_error = syntax_error(line) or self._syntax_error
            self._failure = self._failure or start_failure(line, self._syntax_error)
            if line.startswith(EXIT_REASON_PREFIX) and self._exit_reason is None:
                self._exit_reason = line.removeprefix(EXIT_REASON_PREFIX).strip()
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

"""One tritonserver process under its guard: its command line, its log, its end."""

from __future__ import annotations

import contextlib
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

from glm_image.ipc import run_directory
from glm_image.supervisor import watchdog
from glm_image.supervisor.api_access import closing_flags
from glm_image.supervisor.installation import Installation
from glm_image.supervisor.settings import ServerSettings, unloading_of
from glm_image.supervisor.triton_log import (
    SERVICES,
    StartFailure,
    drained_model,
    start_failure,
    started_service,
    syntax_error,
    unloaded_model,
)

LOG_TAIL_LINES = 200
METRICS_INTERVAL_MS = 250
FIRST_SIGNAL_CODE = 128


class ServerProcess:
    """Starts a tritonserver and follows its log; every port of ``settings`` is a real one.

    ``restarts`` is how often the same server was started before.
    """

    def __init__(
        self, installation: Installation, settings: ServerSettings, log: TextIO | None, restarts: int = 0
    ) -> None:
        self.shm_prefix = f"glm_image_{secrets.token_hex(8)}_"
        self._run_directory = Path(tempfile.mkdtemp(prefix="glm-image-serve-"))
        self._log = log
        self._tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._syntax_error: str | None = None
        self._changed = threading.Condition()
        self._started: set[str] = set()
        self._failure: StartFailure | None = None
        self._ended = False
        self._last_words: str | None = None
        self._entrances, self._stages = unloading_of(settings.model_repository)
        self._drained: set[str] = set()
        self._unloaded: set[str] = set()
        self._next_order: bytes | None = None
        try:
            self._guard = self._launch(installation, settings, restarts)
        except BaseException:
            watchdog.remove_leftovers(self.shm_prefix, self._run_directory)
            raise
        self._reader = threading.Thread(target=self._follow_log, name="triton-log", daemon=True)
        self._reader.start()

    @property
    def log_tail(self) -> str:
        """The last lines of the server's log."""
        with self._changed:
            return "".join(self._tail)

    @property
    def returncode(self) -> int | None:
        """The server's exit code, 128 + n when signal n ended it, None while it runs."""
        return self._guard.poll()

    @property
    def end_reason(self) -> str:
        """Why a server that has ended did so by itself."""
        with self._changed:
            return self._last_words or f"tritonserver ended by itself, {_told(self._guard.wait())}"

    def wait_started(self) -> StartFailure | None:
        """Waits until every service listens (None) or the log says why that will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._failure is not None or self._started >= SERVICES)
            if self._failure is None and self._ended:
                if self._last_words is not None:
                    return StartFailure(self._last_words)
                lines = [line.strip() for line in self._tail if line.strip()]
                return StartFailure(f"tritonserver ended while starting: {lines[-1] if lines else 'it said nothing'}")
            return self._failure

    def request_watch(self) -> None:
        """Lets the server be ended when one of its processes breaks: all of them are there now."""
        self._order(b"watch\n")

    def request_stop(self) -> None:
        """Asks for the end after what is in flight; returns at once, safe in a signal handler.

        Once Triton is asked to end, a request that is between two steps of an ensemble is refused. So what takes
        requests is unloaded first, which makes the server unready; when the last answer is out, the others are, all at
        once; then Triton is asked. It would unload them, too, and look but once a second whether they are.
        """
        self._next_order = b"unload\n"
        self._order(b"drain\n" if self._entrances else b"stop\n")

    def request_kill(self) -> None:
        """Asks for the end now; returns at once, safe in a signal handler."""
        self._order(b"kill\n")

    def wait(self) -> int:
        """Waits for the end and for the last line of the log; returns the exit code."""
        code = self._guard.wait()
        self._reader.join()
        # The guard has done this, unless it was killed itself.
        watchdog.remove_leftovers(self.shm_prefix, self._run_directory)
        return code

    def _launch(self, installation: Installation, settings: ServerSettings, restarts: int) -> subprocess.Popen[bytes]:
        backends = installation.lay_out_backends(self._run_directory)
        return subprocess.Popen(
            [*self._guard_command(settings), "--", *self._server_command(installation, settings, backends)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A model's import path begins with the server's working directory, where this package lies.
            cwd=backends / "python",
            env={
                **installation.environment(),
                **settings.model_environment(),
                run_directory.VARIABLE: str(self._run_directory),
                "GLM_IMAGE_RESTARTS": str(restarts),
            },
            start_new_session=True,  # a terminal's Ctrl-C is for this process alone, which then stops the server
        )

    def _guard_command(self, settings: ServerSettings) -> list[str]:
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
            # A server that ends waits for the thread that collects them, which sleeps for so long.
            f"--metrics-interval-ms={METRICS_INTERVAL_MS}",
            f"--exit-timeout-secs={settings.drain_seconds}",
            # For the models' own processes, which unload what takes requests; the API is closed to everybody else.
            "--model-control-mode=explicit",
            "--load-model=*",
            "--disable-auto-complete-config",
            *closing_flags(settings.open_apis),
            *settings.trace_flags(),
            *installation.input_limit_flags(settings.max_request_bytes),
            # Triton would keep the buffers of its largest gRPC requests for later ones.
            "--grpc-infer-allocation-pool-size=0",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            *([f"--model-config-name={settings.profile}"] if settings.profile else []),
        ]

    def _follow_log(self) -> None:
        assert self._guard.stderr is not None
        with self._guard.stderr as stream:
            for line in stream:
                # Triton writes the end of a line apart from it, and may end in between.
                self._take_line(line.decode(errors="replace").removesuffix("\n") + "\n")
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take_line(self, line: str) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone; the server goes on
                self._log.write(line)
                self._log.flush()
        with self._changed:
            self._tail.append(line)
            if service := started_service(line):
                self._started.add(service)
            self._syntax_error = syntax_error(line) or self._syntax_error
            self._failure = self._failure or start_failure(line, self._syntax_error)
            if line.startswith(watchdog.LAST_WORDS) and self._last_words is None:
                self._last_words = line.removeprefix(watchdog.LAST_WORDS).strip()
            self._follow_stop(line)
            self._changed.notify_all()

    def _follow_stop(self, line: str) -> None:
        if drained := drained_model(line):
            self._drained.add(drained)
        if unloaded := unloaded_model(line):
            self._unloaded.add(unloaded)
        if self._next_order == b"unload\n" and self._entrances <= self._drained | self._unloaded:
            self._next_order = b"stop\n"
            self._order(b"unload\n")
        if self._next_order == b"stop\n" and self._entrances | self._stages <= self._unloaded:
            self._next_order = None
            self._order(b"stop\n")

    def _order(self, order: bytes) -> None:
        assert self._guard.stdin is not None
        # Not through the buffered file, which a signal handler may not enter twice.
        with contextlib.suppress(BrokenPipeError):  # it has ended
            os.write(self._guard.stdin.fileno(), order)


def _told(code: int) -> str:
    """An exit code in words: ``128 + n`` is the end by signal n, as ``-n`` is."""
    number = -code if code < 0 else code - FIRST_SIGNAL_CODE
    if number in set(signal.Signals):
        return f"by {signal.Signals(number).name}"
    return f"with exit code {code}"

"""A process of the fleet: its log, its readiness, its restarts, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from glm_image.errors import GlmImageError
from glm_image.supervisor.restarts import RestartPolicy

WITH_PARENT: Final = Path(__file__).with_name("with_parent.py")
READY: Final = "ready: "
TAIL_LINES: Final = 20
START_SECONDS: Final = 900.0
"""As long as the largest checkpoint loads."""
KILL_SECONDS: Final = 20.0
"""After the time limit of a stop, until a process that still runs is killed."""


class FleetError(GlmImageError):
    """A process of the fleet did not start, or ended too often."""


class KeptProcess:
    """A process that is started again whenever it breaks, until it is stopped or ends with code 0.

    It runs in a session of its own, and is stopped when this process dies.

    Args:
        name: begins each line of its log.
        command: its program and arguments.
        environment: of the process.
        log: gets each line that it writes, and a line about each restart.
        is_ready: checked until it is true; None = the process prints a line that begins with ``READY``.
        policy: how often, and with which pauses, it is started again.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Callable[[str], object],
        is_ready: Callable[[], bool] | None = None,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.name, self._command, self._environment = name, list(command), dict(environment)
        self._log, self._is_ready = log, is_ready
        self._policy = policy or RestartPolicy()
        self._stopping, self._restarting = threading.Event(), threading.Event()
        self._changed = threading.Condition()
        self._ready_line: str | None = None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep_running, name=name, daemon=True)
        self._has_ended = False
        self.starts = 0
        """How often it was started."""
        self.failure: FleetError | None = None
        """Why it ended for good, without a request to stop."""

    @property
    def pid(self) -> int:
        """The id of its latest process.

        Raises:
            FleetError: it has not been started.
        """
        if self._process is None:
            raise FleetError(f"{self.name} has not been started")
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it ended for good."""
        return self._has_ended

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self) -> str:
        """Waits until the latest process is ready; returns its line that says so, if it prints one.

        Raises:
            FleetError: it ended for good before, or is not ready after ``START_SECONDS``.
        """
        with self._changed:
            is_known = self._changed.wait_for(
                lambda: self._ready_line is not None or self.failure is not None or self.has_ended, START_SECONDS
            )
            if not is_known:
                raise FleetError(f"{self.name} is not ready after {START_SECONDS:g} s: {self._last_line()}")
            if self._ready_line is None:
                raise self.failure or FleetError(f"{self.name} has ended")
            return self._ready_line

    def wait_restarted(self, starts: int) -> str:
        """As ``wait_ready``, for a process later than the first ``starts``."""
        with self._changed:
            self._changed.wait_for(lambda: self.starts > starts or self.failure is not None or self.has_ended)
        return self.wait_ready()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to its latest process alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def restart(self) -> None:
        """Requests a stop after the requests in flight and another start; does not block."""
        self._restarting.set()
        self.send(signal.SIGTERM)

    def request_stop(self) -> None:
        """Requests a stop after the requests in flight; does not block."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait_ended(self, seconds: float) -> None:
        """Waits for the end, and kills the process after ``seconds``, with those that it has started."""
        if self._thread.ident is None:
            return
        self._thread.join(seconds + KILL_SECONDS)
        if self._thread.is_alive() and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._thread.join()

    def _keep_running(self) -> None:
        restarts = 0
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                code = self._run()
                if self._restarting.is_set() and not self._stopping.is_set():
                    self._restarting.clear()
                    continue
                if self._stopping.is_set() or code == 0:  # it got SIGTERM from elsewhere
                    return
                reason = f"{self.name} ended with code {code}"
                if self._ready_line is None and self.starts == 1:
                    self.failure = FleetError(f"{reason} while starting: {self._last_line()}")
                    return
                if time.monotonic() - started >= self._policy.steady_seconds:
                    restarts = 0
                if restarts >= self._policy.max_restarts:
                    self.failure = FleetError(f"{reason}; restarts in a row before: {restarts}")
                    return
                pause = self._policy.pause(restarts)
                restarts += 1
                self._log(f"restart {restarts} of {self._policy.max_restarts} in {pause:g} s: {reason}")
                self._stopping.wait(pause)
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _run(self) -> int:
        """Runs the process until it ends; returns its exit code."""
        arguments = [sys.executable, "-I", "-S", str(WITH_PARENT), *self._command]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=self._environment, start_new_session=True
        ) as process:
            with self._changed:
                self._process, self._ready_line = process, None
                self.starts += 1
                self._changed.notify_all()
            if self._stopping.is_set():  # meanwhile
                process.terminate()
            assert process.stderr is not None
            assert process.stdout is not None
            errors = threading.Thread(target=self._read, args=(process.stderr,), name=f"{self.name}-log", daemon=True)
            errors.start()
            if self._is_ready is not None:
                self._wait_for_condition(process)
            self._read(process.stdout)
            errors.join()
            process.wait()
        return process.returncode

    def _wait_for_condition(self, process: subprocess.Popen[bytes]) -> None:
        assert self._is_ready is not None
        while process.poll() is None and not self._stopping.is_set():
            if self._is_ready():
                self._set_ready(READY)
                return
            self._stopping.wait(0.05)

    def _read(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            self._tail.append(line)
            self._log(line)
            if line.startswith(READY):
                self._set_ready(line)

    def _set_ready(self, line: str) -> None:
        with self._changed:
            self._ready_line = line
            self._changed.notify_all()

    def _last_line(self) -> str:
        errors = [line for line in self._tail if line.startswith("error: ")]
        return (errors or [line for line in self._tail if line.strip()] or ["its log is empty"])[-1]

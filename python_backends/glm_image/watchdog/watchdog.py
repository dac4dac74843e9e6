"""Runs one tritonserver until none of its processes is left.

The owner writes commands to standard input, one a line: ``watch`` when all models are loaded; ``drain``, ``unload`` and
``stop`` for an orderly end; ``kill``, or the end of the input (the owner has died), for an immediate one. The watchdog
reports to standard output: ``drained MODEL`` when a model has no requests and accepts no more. The server's log goes to
standard error. The watchdog is a child subreaper, so that model processes cannot outlive the server.

From ``watch`` on it kills the server when one of the server's processes dies, is stopped or hangs. Triton 2.51 would
stay ready and never answer the requests that a dead process had accepted; reloading the model in place leaves them open
too. A closed connection is an answer.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from glm_image.watchdog import heartbeats
from glm_image.watchdog.heartbeats import HeartbeatFile, drained_models
from glm_image.watchdog.limits import PR_SET_CHILD_SUBREAPER, prctl, prepare_server
from glm_image.watchdog.log_relay import LogRelay
from glm_image.watchdog.processes import (
    Stat,
    WatchedProcess,
    children_of,
    find_loaded_later,
    find_processes,
    kill_children,
)
from glm_image.watchdog.timers import Timers

STOP_GRACE_SECONDS = 10.0
"""Time for Triton to end after the drain, before it is killed."""
UNLOAD_SECONDS = 2.0
"""Time to unload idle models: Triton checks once a second whether a model's process has ended."""
DRAIN_CHECK_SECONDS = 0.05
CHECK_SECONDS = 2.0
SERVER_PIPE_BYTES = 1 << 20
"""Of the log, so that the server need not wait for this process either."""
LAST_LINES_SECONDS = 5.0
"""Time for the owner to take the rest of the log."""
EXIT_REASON_PREFIX = "the server is ended: "
"""Begins the line on standard error that gives the reason."""


def _readable_signals() -> int:
    """Returns a file descriptor from which the numbers of received signals are read."""
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return readable


class Watchdog:
    """Runs one server, from its start until none of its processes is left."""

    def __init__(self, command: list[str], run_directory: Path, drain_seconds: float) -> None:
        self._heartbeats = run_directory / heartbeats.FOLDER
        self._drain_seconds = drain_seconds
        self._watched: dict[int, WatchedProcess] = {}
        self._dead_while_loading: set[int] = set()
        self._drained: set[str] = set()
        self._returncode: int | None = None
        self._timers = Timers()
        self._timers.start(self._check_processes, CHECK_SECONDS)
        self._commands: dict[str, Callable[[], None]] = {
            "watch": self._watch,
            "drain": self._drain,
            "unload": self._unload,
            "stop": self._stop,
            "kill": self._kill,
        }
        self._signals = _readable_signals()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        # preexec_fn is safe here because this process has one thread. The server's standard output joins its log.
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            pipesize=SERVER_PIPE_BYTES,
            preexec_fn=prepare_server,  # noqa: PLW1509
        )
        assert self._server.stdout is not None
        self._log = LogRelay(self._server.stdout.fileno(), sys.stderr.fileno())

    def run(self) -> int:
        """Runs until the server has ended; returns its exit code, 128 + n after signal n."""
        owner = [0]
        while self._returncode is None:
            log = [] if self._log.at_end else [self._log.source]
            sources = [*owner, *log, self._signals, *self._watched]
            targets = [self._log.target] if self._log.has_waiting else []
            ready, writable, _ = select.select(sources, targets, [], self._timers.seconds_left())
            if self._signals in ready and {signal.SIGTERM, signal.SIGINT} & set(os.read(self._signals, 4096)):
                self._stop()
            if self._log.source in ready:
                self._log.read()
            if writable:
                self._log.write()
            if 0 in ready:
                owner = self._obey(os.read(0, 4096))
            for descriptor in ready:
                if descriptor in self._watched:
                    self._handle_end(self._watched.pop(descriptor))
            self._reap()
            self._timers.run_due()
        kill_children()
        self._log.close(LAST_LINES_SECONDS)
        return self._returncode if self._returncode >= 0 else 128 - self._returncode

    def _obey(self, commands: bytes) -> list[int]:
        """Carries out the owner's commands; returns its descriptor, unless it has died."""
        for command in commands.decode().split() if commands else ["kill"]:
            self._commands[command]()
        return [0] if commands else []

    def _watch(self) -> None:
        self._watched = {process.ended: process for process in find_processes(self._server.pid, self._heartbeats)}

    def _check_processes(self) -> None:
        self._timers.start(self._check_processes, CHECK_SECONDS)
        self._log.summarize()
        if self._watched:
            known = {process.pid for process in self._watched.values()}
            for process in find_loaded_later(self._server.pid, known, self._heartbeats):
                self._watched[process.ended] = process
        for check in [process.check for process in self._watched.values()] or [self._check_loading]:
            if fault := check():
                self._end(fault)

    def _check_loading(self) -> str | None:
        """Reports a model's process that has died and that Triton, which may wait for it forever, has not reaped."""
        children = [(pid, Stat.read(pid)) for pid in children_of(self._server.pid)]
        dead = {pid: stat for pid, stat in children if stat is not None and stat.state == "Z"}
        already_dead, self._dead_while_loading = self._dead_while_loading, set(dead)
        for pid in sorted(dead.keys() & already_dead):
            return f"a model's process ({pid}) {dead[pid].ending()[0]} while it was loaded"
        return None

    def _handle_end(self, process: WatchedProcess) -> None:
        end = process.end()
        process.close()
        # Models' processes end before a stopping server does; _reap handles the server's own end.
        is_expected = end.is_unload or self._timers.is_running(self._kill)
        if process.pid != self._server.pid and (end.by_signal or not is_expected):
            self._end(end.description)

    def _end(self, reason: str) -> None:
        self._log.put(f"{EXIT_REASON_PREFIX}{reason}")
        self._kill()

    def _heartbeat_files(self) -> list[HeartbeatFile]:
        return [process.heartbeat for process in self._watched.values() if process.heartbeat is not None]

    def _drain(self) -> None:
        """Has the entry models finish their requests and unloads them; the owner sends ``unload`` afterwards."""
        self._timers.start_at_most(self._kill, self._drain_seconds + STOP_GRACE_SECONDS)
        self._timers.start(self._stop, self._drain_seconds)
        self._timers.start(self._check_drained, 0)
        self._send_to_models(b"drain\n")

    def _check_drained(self) -> None:
        self._timers.start(self._check_drained, DRAIN_CHECK_SECONDS)
        for model in sorted(drained_models(self._heartbeat_files()) - self._drained):
            self._drained.add(model)
            with contextlib.suppress(OSError):  # the owner has died, and the end of the input follows
                os.write(1, f"drained {model}\n".encode())

    def _unload(self) -> None:
        """Unloads the other models concurrently; the owner sends ``stop`` afterwards."""
        self._timers.cancel(self._check_drained)
        if self._timers.is_running(self._stop):
            self._timers.start_at_most(self._stop, UNLOAD_SECONDS)
            self._send_to_models(b"unload\n")

    def _send_to_models(self, command: bytes) -> None:
        for file in self._heartbeat_files():
            file.send(command)

    def _stop(self) -> None:
        self._timers.start_at_most(self._kill, self._drain_seconds + STOP_GRACE_SECONDS)
        self._timers.cancel(self._stop)
        self._timers.cancel(self._check_drained)
        self._signal(signal.SIGTERM)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # Not Popen.send_signal, which would reap the server before _reap does.
        if self._returncode is None:
            os.kill(self._server.pid, number)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._server.pid:
                    self._returncode = self._server.returncode = os.waitstatus_to_exitcode(ended[1])

"""Runs one tritonserver and guarantees that nothing of it outlives its owner.

A standalone script, standard library only. The owner writes commands to its standard input, one a line: ``watch`` when
all models are loaded; ``drain``, ``unload`` and ``stop`` for an orderly end; ``kill``, or the end of the input (the
owner has died), for an immediate one. It reports to its standard output: ``drained MODEL`` when a model has no requests
and accepts no more. It is a child subreaper, so that model processes cannot outlive the server, and removes the
server's shared memory and run directory last.

From ``watch`` on it kills the server when one of the server's processes dies, is stopped or hangs. Triton 2.51 would
stay ready and never answer the requests that a dead process had accepted; reloading the model in place leaves them open
too. A closed connection is an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SHARED_MEMORY = Path("/dev/shm")
# Triton 2.51 parses nested JSON recursively, with some 300 bytes of stack a level: with the usual 8 MiB a request of
# 50 kB crashes the server, with this stack one of 1.6 MB does. Untouched stack takes no memory.
SERVER_STACK_BYTES = 256 * 1024 * 1024
STOP_GRACE_SECONDS = 10.0
"""Time for Triton to end after the drain, before it is killed."""
UNLOAD_SECONDS = 2.0
"""Time to unload idle models: Triton checks once a second whether a model's process has ended."""
DRAIN_CHECK_SECONDS = 0.05
CHECK_SECONDS = 2.0
MAX_MISSED_CHECKS = 4
"""Checks in a row without a heartbeat, after which a process counts as hung: 6 to 8 seconds."""

STUB = "triton_python_backend_stub"
STUB_NAME_IN_STAT = STUB[:15]  # Linux truncates the names of processes
HEARTBEATS = "heartbeats"
"""The folder of the run directory that holds the heartbeat files; see ``glm_image.telemetry.heartbeat``."""
NANOSECONDS = 1_000_000_000
EXIT_REASON_PREFIX = "the server is ended: "
"""Begins the line on standard error that gives the reason."""


class HeartbeatRecord(NamedTuple):
    """The content of a heartbeat file: 64-bit words in native byte order.

    Attributes:
        pid: the process; 0 = it is not watched.
        beats: a counter that changes at every beat.
        busy_since: start of the oldest command that runs, on the monotonic clock in ns; 0 = idle.
        hang_ns: how long a command may run, in ns; 0 = no limit.
        drained: 1 = the process has no requests and accepts no more.
    """

    pid: int = 0
    beats: int = 0
    busy_since: int = 0
    hang_ns: int = 0
    drained: int = 0

    @classmethod
    def read(cls, path: Path | None) -> HeartbeatRecord:
        """Returns zeros if there is no file or it is incomplete."""
        content = b"" if path is None else path.read_bytes()
        return cls(*HEARTBEAT.unpack(content)) if len(content) == HEARTBEAT.size else cls()


HEARTBEAT = struct.Struct(f"={len(HeartbeatRecord._fields)}q")


class Timers:
    """Callbacks that are called once at a deadline; a callback has at most one deadline."""

    def __init__(self) -> None:
        self._deadlines: dict[Callable[[], None], float] = {}

    def start(self, callback: Callable[[], None], seconds: float) -> None:
        self._deadlines[callback] = time.monotonic() + seconds

    def start_at_most(self, callback: Callable[[], None], seconds: float) -> None:
        """Like ``start``, but keeps a deadline that is earlier."""
        self._deadlines[callback] = min(self._deadlines.get(callback, float("inf")), time.monotonic() + seconds)

    def cancel(self, callback: Callable[[], None]) -> None:
        self._deadlines.pop(callback, None)

    def is_running(self, callback: Callable[[], None]) -> bool:
        return callback in self._deadlines

    def seconds_left(self) -> float:
        return max(0.0, min(self._deadlines.values()) - time.monotonic())

    def run_due(self) -> None:
        now = time.monotonic()
        for callback in [callback for callback, deadline in self._deadlines.items() if now >= deadline]:
            self.cancel(callback)
            callback()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _prepare_server() -> None:
    """Runs in the server's process before exec: the server dies with this process, and its threads get large stacks."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    # With an unlimited stack glibc gives threads 2 MiB.
    stack = SERVER_STACK_BYTES if soft == resource.RLIM_INFINITY else max(soft, SERVER_STACK_BYTES)
    if hard != resource.RLIM_INFINITY:
        stack = min(stack, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))


def remove_leftovers(shm_prefix: str, run_directory: Path) -> None:
    """Removes a server's shared memory and its run directory."""
    for region in SHARED_MEMORY.glob(f"{shm_prefix}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(run_directory, ignore_errors=True)


@dataclass(frozen=True)
class Stat:
    """A process's entry in /proc."""

    name: str
    state: str
    parent: int
    wait_status: int

    @classmethod
    def read(cls, pid: int) -> Stat | None:
        """Returns None if there is no such process."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        before, _, after = text.rpartition(")")
        fields = after.split()
        return cls(before.partition("(")[2], fields[0], int(fields[1]), int(fields[49]))

    def ending(self) -> tuple[str, bool]:
        """Returns a description of how the process ended, and whether a signal killed it."""
        code = os.waitstatus_to_exitcode(self.wait_status)
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}", True
        return f"ended with exit code {code}", False


def children_of(parent: int) -> list[int]:
    """Returns the children of a process, adopted ones and zombies included."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if (stat := Stat.read(pid)) is not None and stat.parent == parent]


def _kill_children() -> None:
    """Kills all descendants: a dead child's own children become ours, as this process is a subreaper."""
    while True:
        for pid in children_of(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class WatchedProcess:
    """A process that must live as long as its server: the server's own or a model's."""

    def __init__(self, pid: int, name: str, heartbeat: Path | None) -> None:
        self.pid = pid
        self.ended = os.pidfd_open(pid)
        self._label = f"{name} (process {pid})"
        self._heartbeat = heartbeat
        self._beats = -1
        self._missed_checks = 0

    def end(self) -> tuple[str, bool]:
        """Returns a description of the end, once ``ended`` is readable, and whether a signal caused it."""
        stat = Stat.read(self.pid)
        if stat is None or stat.state != "Z":  # its parent has already reaped it
            return f"{self._label} ended", False
        description, by_signal = stat.ending()
        return f"{self._label} {description}", by_signal

    def check(self) -> str | None:
        """Returns the fault of the process, or None."""
        stat = Stat.read(self.pid)
        if stat is None or stat.state == "Z":
            return None  # reported through ``ended``
        record = HeartbeatRecord.read(self._heartbeat)
        is_stopped, has_heartbeat = stat.state in "Tt", record.pid == self.pid
        is_silent = is_stopped or (has_heartbeat and record.beats == self._beats)
        self._beats = record.beats
        self._missed_checks = self._missed_checks + 1 if is_silent else 0
        if self._missed_checks >= MAX_MISSED_CHECKS:
            fault = "has been stopped" if is_stopped else "hangs: it has shown no sign of life"
            return f"{self._label} {fault} for seconds"
        busy = time.monotonic_ns() - record.busy_since
        if has_heartbeat and record.busy_since and 0 < record.hang_ns < busy:
            limit = f"more than hang_seconds ({record.hang_ns / NANOSECONDS:g})"
            return f"{self._label} hangs: it has been in one command for {busy / NANOSECONDS:.1f} s, {limit}"
        return None


def find_processes(server: int, heartbeats: Path) -> list[WatchedProcess]:
    """Returns a server's process and those of its models, including processes that have just died."""
    files = {HeartbeatRecord.read(path).pid: path for path in heartbeats.glob("*.heartbeat")}
    stubs = [pid for pid in children_of(server) if (stat := Stat.read(pid)) and stat.name == STUB_NAME_IN_STAT]
    processes = []
    for pid in [server, *stubs]:
        path = files.get(pid)
        name = "tritonserver" if pid == server else path.stem if path else _model_of(pid)
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile; its parent notices
            processes.append(WatchedProcess(pid, name, path))
    return processes


def drained_models(heartbeats: Path) -> set[str]:
    """Returns the models all of whose instances have drained; a heartbeat file is named ``MODEL_INDEX``."""
    drained: dict[str, bool] = {}
    for path in heartbeats.glob("*.heartbeat"):
        model, record = path.stem.rpartition("_")[0], HeartbeatRecord.read(path)
        drained[model] = drained.get(model, True) and bool(record.drained)
    return {model for model, is_drained in drained.items() if is_drained}


def _readable_signals() -> int:
    """Returns a file descriptor from which the numbers of received signals are read."""
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return readable


def _model_of(stub: int) -> str:
    try:
        arguments = Path(f"/proc/{stub}/cmdline").read_text().split("\0")
    except OSError:
        arguments = []
    return Path(arguments[1]).parents[1].name if len(arguments) > 1 else "a model"


class Watchdog:
    """Runs one server, from its start until none of its processes is left."""

    def __init__(self, command: list[str], run_directory: Path, drain_seconds: float) -> None:
        self._heartbeats = run_directory / HEARTBEATS
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
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        # preexec_fn is safe here because this process has one thread. The server's standard output joins its log.
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=_prepare_server)  # noqa: PLW1509

    def run(self) -> int:
        """Runs until the server has ended; returns its exit code, 128 + n after signal n."""
        owner = [0]
        while self._returncode is None:
            ready = select.select([*owner, self._signals, *self._watched], [], [], self._timers.seconds_left())[0]
            if self._signals in ready and {signal.SIGTERM, signal.SIGINT} & set(os.read(self._signals, 4096)):
                self._stop()
            if 0 in ready:
                commands = os.read(0, 4096)
                owner = owner if commands else []
                for command in commands.decode().split() if commands else ["kill"]:
                    self._commands[command]()
            for descriptor in ready:
                if descriptor in self._watched:
                    self._handle_end(self._watched.pop(descriptor))
            self._reap()
            self._timers.run_due()
        _kill_children()
        return self._returncode if self._returncode >= 0 else 128 - self._returncode

    def _watch(self) -> None:
        self._watched = {process.ended: process for process in find_processes(self._server.pid, self._heartbeats)}

    def _check_processes(self) -> None:
        self._timers.start(self._check_processes, CHECK_SECONDS)
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
        os.close(process.ended)
        description, by_signal = process.end()
        # Models' processes end before a stopping server does; _reap handles the server's own end.
        is_stopping = self._timers.is_running(self._kill)
        if process.pid != self._server.pid and (by_signal or not is_stopping):
            self._end(description)

    def _end(self, reason: str) -> None:
        print(f"{EXIT_REASON_PREFIX}{reason}", file=sys.stderr, flush=True)
        self._kill()

    def _drain(self) -> None:
        """Has the entry models finish their requests and unloads them; the owner sends ``unload`` afterwards."""
        self._timers.start_at_most(self._kill, self._drain_seconds + STOP_GRACE_SECONDS)
        self._timers.start(self._stop, self._drain_seconds)
        self._timers.start(self._check_drained, 0)
        self._send_to_models(b"drain\n")

    def _check_drained(self) -> None:
        self._timers.start(self._check_drained, DRAIN_CHECK_SECONDS)
        for model in sorted(drained_models(self._heartbeats) - self._drained):
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
        for pipe in self._heartbeats.glob("*.commands"):
            with contextlib.suppress(OSError):  # the process has ended
                descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                os.write(descriptor, command)
                os.close(descriptor)

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


def main() -> int:
    """Runs the command after ``--``; returns its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shm-prefix", required=True)
    parser.add_argument("--run-directory", required=True, type=Path)
    parser.add_argument("--drain-seconds", required=True, type=float)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    try:
        return Watchdog(arguments.command, arguments.run_directory, arguments.drain_seconds).run()
    finally:
        remove_leftovers(arguments.shm_prefix, arguments.run_directory)


if __name__ == "__main__":
    sys.exit(main())

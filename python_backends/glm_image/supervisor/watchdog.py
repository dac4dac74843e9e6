"""Runs one tritonserver and sees to it that nothing of it stays behind, however its owner ends.

A script of its own, standard library only. Its owner speaks through its standard input, an order a line: ``watch`` when
all models are loaded, ``drain``, ``unload`` and ``stop`` for an orderly end, ``kill`` or the end of the input (the
owner is gone) for an immediate one. It adopts what the server leaves running, so that model processes cannot linger
either, and removes the server's shared memory and run directory last.

From ``watch`` on it ends the server with the first of its processes that dies, is stopped or hangs. Triton 2.51 would
go on, say that it is ready, and never answer what a dead process had accepted; a model that is loaded again in place
leaves those requests open too. A closed connection is an answer.
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
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SHARED_MEMORY = Path("/dev/shm")
# Triton 2.51 walks down nested JSON by recursion, some 300 bytes of stack a level: with the usual 8 MiB a request of
# 50 kB ends the server, with this much one of 1.6 MB does. Memory that is not used is not taken.
SERVER_STACK_BYTES = 256 * 1024 * 1024
# What Triton takes to end after its drain, before it is killed.
STOP_GRACE_SECONDS = 10
# What unloading takes that no request keeps waiting: Triton looks for a second whether a model's process lives.
UNLOAD_SECONDS = 2.0

STUB = "triton_python_backend_stub"
NAME_IN_STAT = STUB[:15]  # Linux cuts the names of processes
PULSES = "pulses"
"""The folder of the run directory that holds the heartbeat files; see ``glm_image.telemetry.heartbeat``."""
PAGE = struct.Struct("=4q")
"""A page: process id (0: closed), beats, since when it is busy and how long it may be (0: not, for ever), in ns."""
LOOK_SECONDS = 2.0
SILENT_LOOKS = 4
"""Looks in a row without a sign of life, after which a process is given up: 6 to 8 seconds."""
NANOSECONDS = 1_000_000_000
LAST_WORDS = "the server is ended: "
"""What the line begins with that gives the reason."""


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _prepare_server() -> None:
    """Runs in the server's process before its program: it dies with this one, and its threads get large stacks."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    # No limit is the usual 2 MiB for threads.
    wanted = SERVER_STACK_BYTES if soft == resource.RLIM_INFINITY else max(soft, SERVER_STACK_BYTES)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def remove_leftovers(shm_prefix: str, run_directory: Path) -> None:
    """Removes a server's shared memory and its run directory; what is gone already is no error."""
    for region in SHARED_MEMORY.glob(f"{shm_prefix}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(run_directory, ignore_errors=True)


@dataclass(frozen=True)
class Stat:
    """What /proc tells of a process: its name, state, parent, and, where it is known, its wait status."""

    name: str
    state: str
    parent: int
    wait_status: int

    @classmethod
    def read(cls, pid: int) -> Stat | None:
        """Reads it; None when there is no such process any more."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        before, _, after = text.rpartition(")")
        fields = after.split()
        return cls(before.partition("(")[2], fields[0], int(fields[1]), int(fields[49]))

    def ending(self) -> tuple[str, bool]:
        """Says how a process that has ended did so, and whether by a signal."""
        code = os.waitstatus_to_exitcode(self.wait_status)
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}", True
        return f"ended with exit code {code}", False


def children_of(parent: int) -> list[int]:
    """The processes whose parent is ``parent``, adopted and ended ones included."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if (stat := Stat.read(pid)) is not None and stat.parent == parent]


def _kill_children() -> None:
    """Kills every child and, as each one's children come to us when it dies, all descendants."""
    while True:
        for pid in children_of(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class WatchedProcess:
    """A process that must live as long as its server: the server itself, or one of its models'."""

    def __init__(self, pid: int, name: str, page: Path | None) -> None:
        self.pid = pid
        self._told = f"{name} (process {pid})"
        self._page = page
        self._beats = -1
        self._silent_looks = 0
        self.ended = os.pidfd_open(pid)

    def end(self) -> tuple[str, bool]:
        """Says how it ended, and whether by a signal, once ``ended`` is readable."""
        stat = Stat.read(self.pid)
        if stat is None or stat.state != "Z":  # its parent has already asked, or it was gone before
            return f"{self._told} ended", False
        words, by_signal = stat.ending()
        return f"{self._told} {words}", by_signal

    def fault(self) -> str | None:
        """Looks for signs of life; says what is wrong once they have been missing for too long."""
        stat = Stat.read(self.pid)
        if stat is None or stat.state == "Z":
            return None  # ``ended`` tells
        pid, beats, busy_since, may_last = read_page(self._page)
        is_silent = stat.state in "Tt" or (pid == self.pid and beats == self._beats)
        self._beats = beats
        self._silent_looks = self._silent_looks + 1 if is_silent else 0
        if self._silent_looks >= SILENT_LOOKS:
            what = "has been stopped" if stat.state in "Tt" else "hangs: it has shown no sign of life"
            return f"{self._told} {what} for seconds"
        busy = time.monotonic_ns() - busy_since
        if pid == self.pid and busy_since and 0 < may_last < busy:
            allowed = f"more than hang_seconds ({may_last / NANOSECONDS:g})"
            return f"{self._told} hangs: it has been in one command for {busy / NANOSECONDS:.1f} s, {allowed}"
        return None


def read_page(page: Path | None) -> tuple[int, int, int, int]:
    """Returns what ``PAGE`` names; all 0 where there is no page, or it is just being made."""
    content = b"" if page is None else page.read_bytes()
    pid, beats, busy_since, may_last = PAGE.unpack(content if len(content) == PAGE.size else bytes(PAGE.size))
    return pid, beats, busy_since, may_last


def find_watched(server: int, pulses: Path) -> list[WatchedProcess]:
    """Returns a server and its models' processes, those that have just died included."""
    pages = {read_page(page)[0]: page for page in pulses.glob("*.page")}
    stubs = [pid for pid in children_of(server) if (stat := Stat.read(pid)) and stat.name == NAME_IN_STAT]
    found = []
    for pid in [server, *stubs]:
        page = pages.get(pid)
        name = "tritonserver" if pid == server else page.stem if page else _model_of(pid)
        with contextlib.suppress(ProcessLookupError):  # it ended while we looked, and its parent knows
            found.append(WatchedProcess(pid, name, page))
    return found


def _model_of(stub: int) -> str:
    try:
        arguments = Path(f"/proc/{stub}/cmdline").read_text().split("\0")
    except OSError:
        arguments = []
    return Path(arguments[1]).parents[1].name if len(arguments) > 1 else "a model"


class Watchdog:
    """One server's process, from its start to the last trace of it."""

    def __init__(self, command: list[str], run_directory: Path, drain_seconds: float) -> None:
        self._pulses = run_directory / PULSES
        self._drain_seconds = drain_seconds
        self._watched: dict[int, WatchedProcess] = {}
        self._dead_while_loading: set[int] = set()
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._stop_at: float | None = None
        self._kill_at: float | None = None
        self._returncode: int | None = None
        self._signals = self._catch_signals()
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        # Safe here, and only here: this process has one thread. The server's standard output joins its log.
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=_prepare_server)  # noqa: PLW1509

    @staticmethod
    def _catch_signals() -> int:
        """Makes signals readable from the returned file descriptor."""
        readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        return readable

    def run(self) -> int:
        """Waits for the end of the server, sooner if asked; returns its exit code, 128 + n when signal n ended it."""
        owner = [0]
        while self._returncode is None:
            times = [at for at in (self._next_look, self._stop_at, self._kill_at) if at is not None]
            remaining = max(0.0, min(times) - time.monotonic())
            ready = select.select([*owner, self._signals, *self._watched], [], [], remaining)[0]
            if self._signals in ready and {signal.SIGTERM, signal.SIGINT} & set(os.read(self._signals, 4096)):
                self._stop()
            if 0 in ready:
                orders = os.read(0, 4096)
                owner = owner if orders else []
                self._obey(orders.decode().split() if orders else ["kill"])
            for descriptor in ready:
                if descriptor in self._watched:
                    self._tell_end(self._watched.pop(descriptor))
            self._reap()
            self._act_on_time()
        _kill_children()
        return self._returncode if self._returncode >= 0 else 128 - self._returncode

    def _obey(self, orders: list[str]) -> None:
        for order in orders:
            if order == "kill":
                self._signal(signal.SIGKILL)
            elif order == "watch":
                self._watch()
            elif order == "drain":
                self._drain()
            elif order == "unload":
                self._unload()
            else:
                self._stop()

    def _watch(self) -> None:
        self._watched = {watched.ended: watched for watched in find_watched(self._server.pid, self._pulses)}

    def _act_on_time(self) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            if self._watched:
                faults = [watched.fault() for watched in self._watched.values()]
            else:
                faults = [self._fault_while_loading()]
            for fault in filter(None, faults):
                self._give_up(fault)
        if self._stop_at is not None and now >= self._stop_at:
            self._stop()
        if self._kill_at is not None and now >= self._kill_at:
            self._signal(signal.SIGKILL)
            self._kill_at = None

    def _fault_while_loading(self) -> str | None:
        """Looks for a model's process that died, and that Triton, which may wait for it for ever, has not collected."""
        stats = {pid: Stat.read(pid) for pid in children_of(self._server.pid)}
        dead = {pid: stat for pid, stat in stats.items() if stat is not None and stat.state == "Z"}
        again = sorted(dead.keys() & self._dead_while_loading)
        self._dead_while_loading = set(dead)
        return f"a model's process ({again[0]}) {dead[again[0]].ending()[0]} while it was loaded" if again else None

    def _tell_end(self, watched: WatchedProcess) -> None:
        os.close(watched.ended)
        words, by_signal = watched.end()
        # The models' processes end before a stopping server does; _reap tells of the server's own end.
        if watched.pid != self._server.pid and (by_signal or self._kill_at is None):
            self._give_up(words)

    def _give_up(self, reason: str) -> None:
        print(f"{LAST_WORDS}{reason}", file=sys.stderr, flush=True)
        self._signal(signal.SIGKILL)

    def _drain(self) -> None:
        """Lets the models that take requests be unloaded; the owner sees when none is left, and orders ``unload``."""
        self._ends_by(self._drain_seconds + STOP_GRACE_SECONDS)
        self._stop_at = time.monotonic() + self._drain_seconds
        self._pass_on(b"drain\n")

    def _unload(self) -> None:
        """Lets the others be unloaded, all at once; the owner sees when they are, and orders ``stop``."""
        if self._stop_at is not None:
            self._stop_at = min(self._stop_at, time.monotonic() + UNLOAD_SECONDS)
            self._pass_on(b"unload\n")

    def _pass_on(self, order: bytes) -> None:
        for orders in self._pulses.glob("*.orders"):
            with contextlib.suppress(OSError):  # nobody reads any more
                descriptor = os.open(orders, os.O_WRONLY | os.O_NONBLOCK)
                os.write(descriptor, order)
                os.close(descriptor)

    def _stop(self) -> None:
        self._ends_by(self._drain_seconds + STOP_GRACE_SECONDS)
        self._stop_at = None
        self._signal(signal.SIGTERM)

    def _ends_by(self, seconds: float) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic() + seconds

    def _signal(self, number: signal.Signals) -> None:
        # Not through Popen, which would collect the exit code before _reap does.
        if self._returncode is None:
            os.kill(self._server.pid, number)

    def _reap(self) -> None:
        """Collects the server's end, and that of adopted processes."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._server.pid:
                    self._returncode = self._server.returncode = os.waitstatus_to_exitcode(ended[1])


def main() -> int:
    """Runs the command after ``--``."""
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

"""The processes of a server: what /proc says about them, and whether they are alive."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from glm_image.watchdog.heartbeats import HeartbeatFile, find_heartbeat

MAX_MISSED_CHECKS = 4
"""Checks in a row without a heartbeat, after which a process counts as hung: 6 to 8 seconds."""

STUB = "triton_python_backend_stub"
STUB_NAME_IN_STAT = STUB[:15]  # Linux truncates the names of processes
NANOSECONDS = 1_000_000_000


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
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        before, _, after = text.rpartition(")")
        fields = after.split()
        return cls(before.partition("(")[2], fields[0], int(fields[1]), int(fields[49]))

    def ending(self) -> tuple[str, int]:
        """Returns a description of how the process ended, and its exit code, -n after signal n."""
        code = os.waitstatus_to_exitcode(self.wait_status)
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}", code
        return f"ended with exit code {code}", code


def children_of(parent: int) -> list[int]:
    """Returns the children of a process, adopted ones and zombies included."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if (stat := Stat.read(pid)) is not None and stat.parent == parent]


def kill_children() -> None:
    """Kills all descendants: a dead child's own children become ours, as this process is a subreaper."""
    while True:
        for pid in children_of(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        description: names the process.
        by_signal: a signal killed it.
        is_unload: it had closed its heartbeat, as a model does when Triton unloads it, and then ended without error.
    """

    description: str
    by_signal: bool = False
    is_unload: bool = False


class WatchedProcess:
    """A process that must live as long as its server: the server's own or a model's."""

    def __init__(self, pid: int, name: str, heartbeat: HeartbeatFile | None) -> None:
        self.pid, self.heartbeat = pid, heartbeat
        self.ended = os.pidfd_open(pid)
        self._label = f"{name} (process {pid})"
        self._beats = -1
        self._missed_checks = 0

    def end(self) -> End:
        """Returns how it ended, once ``ended`` is readable."""
        stat = Stat.read(self.pid)
        if stat is None or stat.state != "Z":  # its parent has already reaped it
            return End(f"{self._label} ended", is_unload=self._is_closed())
        description, code = stat.ending()
        return End(f"{self._label} {description}", by_signal=code < 0, is_unload=code == 0 and self._is_closed())

    def check(self) -> str | None:
        """Returns the fault of the process, or None."""
        stat = Stat.read(self.pid)
        if stat is None or stat.state == "Z":
            return None  # reported through ``ended``
        record = self.heartbeat.read() if self.heartbeat else None
        has_heartbeat = record is not None and record.pid == self.pid
        beats = record.beats if record else 0
        is_stopped = stat.state in "Tt"
        is_silent = is_stopped or (has_heartbeat and beats == self._beats)
        self._beats = beats
        self._missed_checks = self._missed_checks + 1 if is_silent else 0
        if self._missed_checks >= MAX_MISSED_CHECKS:
            fault = "has been stopped" if is_stopped else "hangs: it has shown no sign of life"
            return f"{self._label} {fault} for seconds"
        if record is None or not has_heartbeat or not record.busy_since:
            return None
        busy = time.monotonic_ns() - record.busy_since
        if 0 < record.hang_ns < busy:
            limit = f"more than hang_seconds ({record.hang_ns / NANOSECONDS:g})"
            return f"{self._label} hangs: it has been in one command for {busy / NANOSECONDS:.1f} s, {limit}"
        return None

    def close(self) -> None:
        os.close(self.ended)
        if self.heartbeat is not None:
            self.heartbeat.close()

    def _is_closed(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.read().pid == 0


def stubs_of(server: int) -> list[int]:
    """Returns the models' processes, including those that have just died."""
    return [pid for pid in children_of(server) if (stat := Stat.read(pid)) and stat.name == STUB_NAME_IN_STAT]


def find_processes(server: int, heartbeats: Path) -> list[WatchedProcess]:
    """Returns a server's process and those of its models, which are all loaded."""
    processes = []
    for pid in [server, *stubs_of(server)]:
        file = None if pid == server else find_heartbeat(heartbeats, pid)
        name = "tritonserver" if pid == server else file.name if file else _model_of(pid)
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile; its parent notices
            processes.append(WatchedProcess(pid, name, file))
    return processes


def find_loaded_later(server: int, known: set[int], heartbeats: Path) -> list[WatchedProcess]:
    """Returns the processes of models that were loaded since: those with a heartbeat, which begins after loading."""
    processes = []
    for pid in set(stubs_of(server)) - known:
        if (file := find_heartbeat(heartbeats, pid)) is not None:
            with contextlib.suppress(ProcessLookupError):
                processes.append(WatchedProcess(pid, file.name, file))
    return processes


def _model_of(stub: int) -> str:
    try:
        arguments = Path(f"/proc/{stub}/cmdline").read_bytes().split(b"\0")
    except OSError:
        arguments = []
    return Path(os.fsdecode(arguments[1])).parents[1].name if len(arguments) > 1 else "a model"

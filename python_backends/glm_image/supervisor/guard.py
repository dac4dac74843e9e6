"""Runs one tritonserver and sees to it that nothing of it stays behind, however its owner ends.

A script of its own, standard library only. Its owner speaks through its standard input: ``stop`` asks for an orderly
end, ``kill`` or the end of the input (the owner is gone) for an immediate one. It adopts what the server leaves
running, so that model processes cannot linger either, and removes the server's shared memory and run directory last.
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
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SHARED_MEMORY = Path("/dev/shm")
# Triton 2.51 walks down nested JSON by recursion, some 300 bytes of stack a level: with the usual 8 MiB a request of
# 50 kB ends the server, with this much one of 1.6 MB does. Memory that is not used is not taken.
SERVER_STACK_BYTES = 256 * 1024 * 1024


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


def _children() -> list[int]:
    """The processes whose parent this one is, adopted ones included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def _kill_children() -> None:
    """Kills every child and, as each one's children come to us when it dies, all descendants."""
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class Guard:
    """One server's process, from its start to the last trace of it."""

    def __init__(self, command: list[str], stop_seconds: float) -> None:
        self._stop_seconds = stop_seconds
        self._deadline: float | None = None
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
        sources = [0, self._signals]
        while self._returncode is None:
            remaining = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            ready = select.select(sources, [], [], remaining)[0]
            if self._signals in ready and {signal.SIGTERM, signal.SIGINT} & set(os.read(self._signals, 4096)):
                self._stop()
            if 0 in ready:
                order = os.read(0, 4096)
                if not order:
                    sources.remove(0)
                if not order or b"kill" in order:
                    self._signal(signal.SIGKILL)
                else:
                    self._stop()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._signal(signal.SIGKILL)
                self._deadline = None
            self._reap()
        _kill_children()
        return self._returncode if self._returncode >= 0 else 128 - self._returncode

    def _stop(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._stop_seconds
            self._signal(signal.SIGTERM)

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
    parser.add_argument("--stop-seconds", required=True, type=float)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    try:
        return Guard(arguments.command, arguments.stop_seconds).run()
    finally:
        remove_leftovers(arguments.shm_prefix, arguments.run_directory)


if __name__ == "__main__":
    sys.exit(main())

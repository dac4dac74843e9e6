"""The heartbeat of a model's process, in a shared memory file that the watchdog reads, and the watchdog's commands.

The watchdog (``glm_image.watchdog``, which imports nothing of this module) names the folder and defines the format of
the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

from glm_image.ipc.run_directory import run_directory
from glm_image.lifecycle.context import NANOSECONDS

logger = logging.getLogger(__name__)

BEAT_SECONDS: Final = 1.0

_PID, _BEATS, _BUSY_SINCE, _HANG_NS, _DRAINED = range(5)

Commands = Mapping[str, Callable[[], None]]
NO_COMMANDS: Final[Commands] = {}

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Heartbeat:
    """Shows that a process is alive, and since when its engine runs its current command.

    A thread beats while it is scheduled: not in a stopped process, nor in one whose interpreter lock is never released.

    Args:
        name: the name of the instance.
        hang_seconds: the longest that a command of the engine may take; 0 = no limit.
        directory: the folder of the heartbeat file; None = in the server's run directory. Without one, there is no
            watchdog, and this does nothing.
    """

    def __init__(self, name: str, hang_seconds: float, directory: Path | None = None) -> None:
        self._busy: dict[object, int] = {}
        self._lock = threading.Lock()
        if directory is None and (server_folder := run_directory()) is not None:
            directory = server_folder / "heartbeats"
        self._directory, self._name = directory, name
        words = ctypes.c_int64 * 5  # aligned, so that another process never reads a half-written one
        self._words = words()
        self._end = os.eventfd(0)
        self._thread: threading.Thread | None = None
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        # A file of its own: when a model is loaded again, its former process may still be using the one of this name.
        new_file = directory / f"{name}.{os.getpid()}"
        new_file.write_bytes(bytes(self._words))
        with new_file.open("r+b") as file:
            self._words = words.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(words)))
        new_file.rename(directory / f"{name}.heartbeat")
        self._words[_HANG_NS] = int(hang_seconds * NANOSECONDS)

    def start(self, is_alive: Callable[[], bool] = lambda: True, commands: Commands = NO_COMMANDS) -> None:
        """Starts to beat; to be called when the model is loaded, as loading may take any time.

        Args:
            is_alive: called before each beat, which is left out if it returns false or does not return.
            commands: run in the heartbeat's thread when the watchdog sends their names: ``drain`` when the server is
                about to end and must accept no more requests; ``unload`` when no request is left.
        """
        if self._directory is None:
            return
        pipe = self._directory / f"{self._name}.commands"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe, 0o600)
        # For reading and writing: a pipe that always has a writer never reaches its end.
        descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        self._words[_PID] = os.getpid()
        self._thread = threading.Thread(
            target=self._beat, args=(descriptor, is_alive, commands), name="heartbeat", daemon=True
        )
        self._thread.start()

    def mark_drained(self) -> None:
        """Reports that the instance has no requests and accepts no more."""
        self._words[_DRAINED] = 1

    def close(self) -> None:
        """Stops the heartbeat; the watchdog ignores the process from now on."""
        self._words[_PID] = 0
        os.eventfd_write(self._end, 1)
        if self._thread is not None:
            self._thread.join()

    def watched(self, run: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
        """Returns ``run`` such that a call of it that takes longer than ``hang_seconds`` is seen."""

        def run_watched(command: Argument) -> Result:
            with self.busy():
                return run(command)

        return run_watched

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Limits the block to ``hang_seconds``; usable by any number of threads concurrently."""
        block = object()
        with self._lock:
            self._busy[block] = time.monotonic_ns()
            self._show_busy()
        try:
            yield
        finally:
            with self._lock:
                del self._busy[block]
                self._show_busy()

    def _show_busy(self) -> None:
        self._words[_BUSY_SINCE] = next(iter(self._busy.values()), 0)  # the oldest one

    def _beat(self, pipe: int, is_alive: Callable[[], bool], commands: Commands) -> None:
        ready: list[int] = []
        while self._end not in ready:
            if is_alive():
                self._words[_BEATS] += 1
            if pipe in ready:
                for name in os.read(pipe, 4096).decode().split():
                    _run_command(name, commands)
            ready = select.select([pipe, self._end], [], [], BEAT_SECONDS)[0]


def _run_command(name: str, commands: Commands) -> None:
    try:
        if name in commands:
            commands[name]()
    except Exception:  # the watchdog ends a server that does not drain in time, and the thread must go on beating
        logger.exception("the watchdog's command %s failed", name)

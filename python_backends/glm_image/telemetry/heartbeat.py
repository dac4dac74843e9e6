"""Signs of life of a model's process, in a page that its server's guard reads, and the guard's orders.

The watchdog (``glm_image.supervisor.watchdog``, which imports nothing of this module) names the folder and defines what
a page holds.
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
from typing import TypeVar

from glm_image.ipc.run_directory import run_directory
from glm_image.lifecycle.context import NANOSECONDS

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0

_PID, _BEATS, _BUSY_SINCE, _MAY_LAST, _DRAINED = range(5)

Orders = Mapping[str, Callable[[], None]]
NO_ORDERS: Orders = {}

Given = TypeVar("Given")
Returned = TypeVar("Returned")


class Heartbeat:
    """Shows that a process lives, and since when its engine has been in the command that it is in.

    A thread beats as long as it gets its turn, which it does not in a process that is stopped or in which another
    thread never lets go of the interpreter.

    Args:
        name: of the instance.
        hang_seconds: how long one command of an engine may take; 0 = for ever.
        directory: where the page is to be; None: in the server's own folder; without one nobody watches.
    """

    def __init__(self, name: str, hang_seconds: float, directory: Path | None = None) -> None:
        self._busy: dict[object, int] = {}
        self._lock = threading.Lock()
        private = run_directory()
        if directory is None and private is not None:
            directory = private / "heartbeats"
        self._directory, self._name = directory, name
        # Whole 64-bit words, which another process never sees half written.
        words = ctypes.c_int64 * 5
        self._page = words()
        self._end = os.eventfd(0)
        self._thread: threading.Thread | None = None
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        page = directory / f"{name}.heartbeat"
        page.write_bytes(bytes(self._page))
        with page.open("r+b") as file:
            self._page = words.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(words)))
        self._page[_MAY_LAST] = int(hang_seconds * NANOSECONDS)

    def start(self, is_alive: Callable[[], bool] = lambda: True, orders: Orders = NO_ORDERS) -> None:
        """Begins to beat: when the model is loaded, and what may take as long as it likes is over.

        Args:
            is_alive: asked before each beat; a process of which it says no, or never says anything, does not live.
            orders: what to do, in the pulse's own thread, at an order of the guard: ``drain`` when the server is to
                end, so that nothing may take requests any more; ``unload`` when none is left.
        """
        if self._directory is None:
            return
        pipe = self._directory / f"{self._name}.commands"
        os.mkfifo(pipe, 0o600)
        # For reading and writing: a pipe that always has a writer has no end.
        descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        self._page[_PID] = os.getpid()
        self._thread = threading.Thread(
            target=self._beat, args=(descriptor, is_alive, orders), name="pulse", daemon=True
        )
        self._thread.start()

    def mark_drained(self) -> None:
        """Reports to the watchdog that the instance has no requests and accepts no more."""
        self._page[_DRAINED] = 1

    def close(self) -> None:
        """Ends the pulse; the guard does not look at it any more."""
        self._page[_PID] = 0
        os.eventfd_write(self._end, 1)
        if self._thread is not None:
            self._thread.join()

    def watched(self, run: Callable[[Given], Returned]) -> Callable[[Given], Returned]:
        """Returns ``run``, each call of which may take ``hang_seconds``."""

        def watching(command: Given) -> Returned:
            with self.busy():
                return run(command)

        return watching

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """What is done inside may take ``hang_seconds``; for any number of threads at once."""
        turn = object()
        with self._lock:
            self._busy[turn] = time.monotonic_ns()
            self._show_busy()
        try:
            yield
        finally:
            with self._lock:
                del self._busy[turn]
                self._show_busy()

    def _show_busy(self) -> None:
        self._page[_BUSY_SINCE] = next(iter(self._busy.values()), 0)  # the oldest one

    def _beat(self, pipe: int, is_alive: Callable[[], bool], orders: Orders) -> None:
        ready: list[int] = []
        while self._end not in ready:
            if is_alive():
                self._page[_BEATS] += 1
            if pipe in ready:
                for order in os.read(pipe, 4096).decode().split():
                    _obey(order, orders)
            ready = select.select([pipe, self._end], [], [], BEAT_SECONDS)[0]


def _obey(order: str, orders: Orders) -> None:
    try:
        if order in orders:
            orders[order]()
    except Exception:  # the server is asked to end after its time for this, and the thread must go on beating
        logger.exception("the order to %s is not carried out", order)

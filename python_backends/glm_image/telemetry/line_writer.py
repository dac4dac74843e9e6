"""Writes lines of a log in a thread of its own: what cannot be written in time is lost and counted."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

MAX_WAITING_BYTES: Final = 1 << 20


def leave_signals_to_main_thread() -> None:
    """Has this thread receive no signals.

    Python runs handlers in the main thread, which continues to wait if the signal interrupts another one: so it is
    after SIGCONT.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


class LineWriter:
    """Accepts lines without ever waiting for the file, the pipe or the disk that they go to.

    Args:
        write: writes a line, in the thread; may block. An OSError means that the line is lost.
        on_lost: called in the thread when lines have been lost, with their number and the error; None = the lines that
            wait take ``max_waiting_bytes``, since the reader or the disk is slow.
        on_written: called in the thread when a line has been written after lines were lost, with the number of all
            that were lost in between.
        max_waiting_bytes: the size of lines that may wait.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        on_lost: Callable[[int, OSError | None], None] = lambda count, error: None,
        on_written: Callable[[int], None] = lambda count: None,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._write, self._on_lost, self._on_written = write, on_lost, on_written
        self._max_waiting_bytes = max_waiting_bytes
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._overflowed = self._lost = 0
        self._is_closed = self._is_writing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Adds a line, or counts it as lost if too many wait; does not block."""
        with self._changed:
            if self._waiting_bytes + len(line) > self._max_waiting_bytes:
                self._overflowed += 1
            else:
                self._lines.append(line)
                self._waiting_bytes += len(line)
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Waits until all lines are written or lost, ``seconds`` at most; returns whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._is_writing, seconds)

    def close(self, seconds: float) -> None:
        """Ends the thread after the last line, or leaves it to the end of the process after ``seconds``."""
        self.flush(seconds)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        leave_signals_to_main_thread()
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._overflowed or self._is_closed)
                overflowed, self._overflowed = self._overflowed, 0
                line = self._lines.popleft() if self._lines else None
                if line is None and not overflowed:
                    return
                self._waiting_bytes -= len(line or b"")
                self._is_writing = True
            if overflowed:
                self._lose(overflowed, None)
            if line is not None:
                self._write_line(line)

    def _write_line(self, line: bytes) -> None:
        try:
            self._write(line)
        except OSError as error:
            self._lose(1, error)
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self._on_written(lost)

    def _lose(self, count: int, error: OSError | None) -> None:
        self._lost += count
        self._on_lost(count, error)

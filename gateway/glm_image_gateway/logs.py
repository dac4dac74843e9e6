"""Log lines through a bounded queue: a log whose reader stops delays no request, it loses lines."""

from __future__ import annotations

import atexit
import logging
import logging.handlers
import queue
import sys
from typing import Final

MAX_LINES: Final = 4096


class _DroppingHandler(logging.handlers.QueueHandler):
    """Counts the lines that the queue has no room for, and reports them with the next line."""

    def __init__(self, lines: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(lines)
        self._lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._lost:
                lost = logging.LogRecord(
                    __name__, logging.WARNING, "", 0, "%d log lines were lost", (self._lost,), None
                )
                self.queue.put_nowait(self.prepare(lost))
                self._lost = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self._lost += 1


def start_logging() -> None:
    """Writes log lines to standard error, in a thread of their own."""
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_LINES)
    handler = _DroppingHandler(lines)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    listener = logging.handlers.QueueListener(lines, writer)
    listener.start()
    # A daemon thread, which a stalled standard error does not keep from ending with the process; but a line that can
    # be written is.
    atexit.register(_finish, lines)


def _finish(lines: queue.Queue[logging.LogRecord]) -> None:
    """Waits a moment until the lines are written."""
    with lines.all_tasks_done:
        lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, timeout=1.0)

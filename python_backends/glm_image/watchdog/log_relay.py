"""Passes the server's log on to its owner, and never keeps the server waiting.

A pipe that is not read fills, and then blocks every process that writes to it: Triton and the models. So the log is
always read, and what its owner does not take in time is dropped and counted.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections import OrderedDict, deque
from collections.abc import Callable

MAX_WAITING_BYTES = 1 << 20
"""Of lines that the owner has not yet taken; further ones are dropped."""
MAX_LINE_BYTES = 64 * 1024
"""Longer lines are divided."""
READ_BYTES = 64 * 1024

REPETITIONS, REPETITION_SECONDS = 100, 10.0
"""A line is passed on at most this many times in this many seconds; after that its repetitions are counted."""
KNOWN_LINES = 64
# Triton's time and thread, which differ between lines of one text.
_PREFIX = re.compile(rb"^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ")


class Repetitions:
    """Passes a line on a few times, and then counts it: a full table of connections repeats one without end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def passes(self, line: bytes) -> bool:
        """Whether to pass this line on."""
        text = _PREFIX.sub(b"", line)
        began, count = self._seen.pop(text, (self._clock(), 0))
        self._seen[text] = began, count + 1
        if len(self._seen) > KNOWN_LINES:
            # Those that are held back stay, as their summary is still to come.
            oldest = next((known for known, (_, seen) in self._seen.items() if seen <= REPETITIONS), None)
            if oldest is not None:
                del self._seen[oldest]
        return count < REPETITIONS

    def summaries(self, *, of_all: bool = False) -> list[bytes]:
        """Returns a line for each one that has been held back; of those whose time is over, or ``of_all``."""
        now, lines = self._clock(), []
        for text, (began, count) in list(self._seen.items()):
            if of_all or now - began >= REPETITION_SECONDS:
                del self._seen[text]
                if count > REPETITIONS:
                    lines.append(b"repeated %d times in %.0f s: %s" % (count, now - began, text))
        return lines


class LogRelay:
    """Reads lines from one pipe and writes them to another, neither of which blocks.

    Args:
        source: the end of the pipe that the server writes to.
        target: the pipe to the owner.
    """

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        os.set_blocking(source, False)
        os.set_blocking(target, False)
        self.at_end = False
        self._repetitions = Repetitions()
        self._incomplete = b""
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = 0

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def read(self) -> None:
        """Takes what the server has written."""
        try:
            content = os.read(self.source, READ_BYTES)
        except BlockingIOError:
            return
        self.at_end = not content
        *lines, self._incomplete = (self._incomplete + content).split(b"\n")
        if self._incomplete and (self.at_end or len(self._incomplete) > MAX_LINE_BYTES):
            lines.append(self._incomplete)
            self._incomplete = b""
        for line in lines:
            if self._repetitions.passes(line):
                self._append(line + b"\n")

    def summarize(self, *, of_all: bool = False) -> None:
        """Adds the lines about repeated ones."""
        for line in self._repetitions.summaries(of_all=of_all):
            self._append(line + b"\n")

    def put(self, line: str) -> None:
        """Adds a line of the watchdog's own, which is never dropped."""
        self._waiting.append(f"{line}\n".encode("utf-8", "backslashreplace"))
        self._waiting_bytes += len(self._waiting[-1])

    def write(self) -> None:
        """Writes what the owner takes now."""
        try:
            while self._waiting:
                written = os.write(self.target, self._waiting[0])
                self._waiting_bytes -= written
                rest = self._waiting.popleft()[written:]
                if rest:
                    self._waiting.appendleft(rest)
        except BlockingIOError:
            return
        except OSError:  # the owner has ended
            self._waiting.clear()
            self._waiting_bytes = 0
        self._report_dropped()

    def close(self, seconds: float) -> None:
        """Passes the rest on; to be called when no process of the server is left. Takes ``seconds`` at most."""
        deadline = time.monotonic() + seconds
        while not self.at_end and select.select([self.source], [], [], max(0.0, deadline - time.monotonic()))[0]:
            self.read()
        self.summarize(of_all=True)
        self.write()
        while self._waiting and select.select([], [self.target], [], max(0.0, deadline - time.monotonic()))[1]:
            self.write()

    def _append(self, line: bytes) -> None:
        if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
            self._dropped += 1
            return
        self._waiting.append(line)
        self._waiting_bytes += len(line)

    def _report_dropped(self) -> None:
        if self._dropped:
            self.put(f"{self._dropped} lines of the log were dropped: serve has not read them in time")
            self._dropped = 0

"""Where ``serve`` writes: its log and its announcements, which a reader that has stopped must not hold up."""

from __future__ import annotations

import io
import os
from typing import TextIO

from glm_image.telemetry.line_writer import LineWriter

FLUSH_SECONDS = 2.0
"""Time for the last lines, before the process ends without them."""


class Output:
    """A stream that is written in a thread of its own; lines that its reader does not take are dropped and counted."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._descriptor = stream, _descriptor_of(stream)
        self._flush_seconds = FLUSH_SECONDS
        self._writer = LineWriter(self._write, on_written=self._report_lost)

    def put(self, line: str) -> None:
        """Adds a line, without its end; does not block."""
        self._writer.put(f"{line}\n".encode("utf-8", "surrogateescape"))

    def flush(self) -> None:
        """Waits for the lines to be written, but not longer than ``FLUSH_SECONDS``, and not twice in vain."""
        is_done = self._writer.flush(self._flush_seconds)
        self._flush_seconds = FLUSH_SECONDS if is_done else 0.0

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            self._stream.write(line.decode("utf-8", "replace"))
            return
        # Not through the stream: its lock, held by a thread that waits, would keep the process from ending.
        while line:
            line = line[os.write(self._descriptor, line) :]

    def _report_lost(self, lost: int) -> None:
        self._write(f"{lost} lines of the log were dropped: its reader had stopped\n".encode())


def _descriptor_of(stream: TextIO) -> int | None:
    try:
        stream.flush()
        return stream.fileno()
    except (io.UnsupportedOperation, ValueError):  # it is in memory
        return None

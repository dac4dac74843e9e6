"""The request log: one JSON object per request, with its parameters, its outcome and its stage times."""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from glm_image.errors import InvalidInputError, is_unsafe, status_of
from glm_image.lifecycle.context import NANOSECONDS, RequestContext, RequestObserver
from glm_image.telemetry.line_writer import LineWriter
from glm_image.telemetry.metrics import Kind, MetricSink, MetricSpec

logger = logging.getLogger(__name__)

FILE: Final = "GLM_IMAGE_REQUEST_LOG"
"""The environment variable that names the log file; without it, lines go to the server's log."""
PROMPTS: Final = "GLM_IMAGE_LOG_PROMPTS"
"""The environment variable that is 1 where lines may contain the text of prompts."""
MAX_PROMPT_CHARACTERS: Final = 1000
"""Of a prompt in a line: with 4 bytes each a line stays below the 4096 that Linux writes into a pipe in one piece."""


LOST_LINES: Final = MetricSpec(
    "glm_image_request_log_lost_lines_total",
    Kind.COUNTER,
    "Lines of the request log that could not be written",
)
CLOSE_SECONDS: Final = 2.0
"""Time for the last lines to be written when the instance ends."""


class LogFile:
    """A file, a device or a pipe that lines are appended to, each in one write, so that those of processes do not mix.

    Opening does not wait for the reader of a named pipe, and writing to it does not either.
    """

    def __init__(self, path: str | None) -> None:
        self._path, self._descriptor = path, -1 if path else sys.stderr.fileno()
        self._is_torn = False

    def write(self, line: bytes) -> None:
        """Appends a line; a line that is cut off is ended before the next.

        Raises:
            OSError: the line is not written, or not whole.
        """
        if self._descriptor < 0:
            assert self._path is not None
            self._descriptor = _open(self._path)
        whole = b"\n" + line if self._is_torn else line
        written = os.write(self._descriptor, whole)
        self._is_torn = (self._is_torn and not written) or 0 < written < len(whole)
        if written < len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _open(path: str) -> int:
    flags = os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        # A named pipe that is opened for writing alone needs a reader.
        return os.open(path, flags | (os.O_RDWR if Path(path).is_fifo() else os.O_WRONLY), 0o640)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0)) from None


class RequestLog(RequestObserver):
    """Writes a line for each request of an instance when it ends; no request waits for that.

    Args:
        instance: the name of the instance.
        is_last: whether successful requests end here; otherwise only failed ones get a line, as the next stage writes
            that of the others.
        record: counts the lines that are lost.
    """

    def __init__(self, instance: str, *, is_last: bool, record: MetricSink) -> None:
        self._path = os.environ.get(FILE)
        self._instance, self._is_last, self._record = instance, is_last, record
        self._has_prompts = os.environ.get(PROMPTS) == "1"
        self._is_warned = False
        self._writer = LineWriter(LogFile(self._path).write, self._lines_lost, self._written_again)

    def close(self) -> None:
        """Writes the last lines; gives up on a file that takes too long."""
        self._writer.close(CLOSE_SECONDS)

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        if error is None and not self._is_last:
            return
        attributes = {name: value for name, value in context.attributes.items() if name != "prompt"}
        if self._has_prompts and "prompt" in context.attributes:
            attributes["prompt"] = context.attributes["prompt"][:MAX_PROMPT_CHARACTERS]
        outcome = {"outcome": "ok" if error is None else status_of(error)}
        # The message of a refusal quotes the input.
        if error is not None and (self._has_prompts or not isinstance(error, InvalidInputError)):
            outcome["error"] = f"{error}"[:MAX_PROMPT_CHARACTERS]
        seconds = {stage: round(float(spent), 6) for stage, spent in context.seconds.items()}
        here = round((time.monotonic_ns() - context.accepted_ns) / NANOSECONDS, 6)
        self._write({"id": context.id, **attributes, **outcome, "seconds": seconds, "seconds_here": here})

    def _write(self, fields: Mapping[str, Any]) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "event": "request", "instance": self._instance, **fields}
        self._writer.put(_json_line(line).encode() + b"\n")

    def _lines_lost(self, count: int, error: OSError | None) -> None:
        self._record(LOST_LINES, count)
        if not self._is_warned and self._path is not None:
            reason = "it is not written fast enough" if error is None else error.strerror
            logger.warning("the request log loses lines: %s", reason)
        self._is_warned = True

    def _written_again(self, lost: int) -> None:
        logger.warning("the request log is written again; lines lost: %d", lost)
        self._is_warned = False


def _json_line(fields: Mapping[str, Any]) -> str:
    """Returns JSON in one line; letters of all scripts stay readable, unsafe characters are escaped as JSON does."""
    text = json.dumps(fields, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(json.dumps(character)[1:-1] if is_unsafe(character) else character for character in text)

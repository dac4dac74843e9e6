"""One line a request, a JSON object: who asked for what, how it ended, and where its time went."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from glm_image.errors import InvalidInputError
from glm_image.lifecycle.context import RequestContext
from glm_image.telemetry.status import status_of

FILE = "GLM_IMAGE_REQUEST_LOG"
"""The variable of the environment that names the file of lines; without it they join the server's log."""
PROMPTS = "GLM_IMAGE_LOG_PROMPTS"
"""The variable that is 1 where lines may hold what people wrote."""
MAX_PROMPT_CHARACTERS = 1000
"""Of a prompt in a line: with 4 bytes each a line stays below the 4096 that Linux writes into a pipe in one piece."""


class RequestLog:
    """Writes an instance's lines.

    Args:
        instance: whose.
        is_last: whether a request that went well ends here; otherwise the next stage has its line.
    """

    def __init__(self, instance: str, *, is_last: bool) -> None:
        path = os.environ.get(FILE)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o640) if path else sys.stderr.fileno()
        self._instance = instance
        self.is_last = is_last
        self.has_prompts = os.environ.get(PROMPTS) == "1"

    def entry(self, request_id: str) -> Entry:
        """Begins the line of a request."""
        return Entry(self, request_id)

    def write(self, facts: Mapping[str, Any]) -> None:
        """Appends a line, in one piece beside those of other processes; a log that is gone is no request's fault."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "event": "request", "instance": self._instance, **facts}
        with contextlib.suppress(OSError):
            os.write(self._file, json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


class Entry:
    """What is known so far of one request."""

    def __init__(self, log: RequestLog, request_id: str) -> None:
        self._log = log
        self._began = time.monotonic()
        self._facts: dict[str, Any] = {"id": request_id}
        self._seconds: Mapping[str, float] = {}
        self._before: Mapping[str, float] = {}

    def follow(self, context: RequestContext, before: Mapping[str, float] | None = None) -> None:
        """Takes a job's id and, when it has ended, its seconds; and those of the stage before."""
        self._facts["id"] = context.id
        self._seconds, self._before = context.seconds, before or {}

    def note(self, prompt: str, **facts: Any) -> None:
        """Takes what was asked for; the prompt is kept only where that is wanted."""
        self._facts.update(facts)
        if self._log.has_prompts:
            self._facts["prompt"] = prompt[:MAX_PROMPT_CHARACTERS]

    def end(self, error: BaseException | None) -> None:
        """Writes the line."""
        if error is None and not self._log.is_last:
            return
        outcome = {"outcome": "ok" if error is None else status_of(error)}
        # The words of a refusal quote what was sent.
        if error is not None and (self._log.has_prompts or not isinstance(error, InvalidInputError)):
            outcome["error"] = f"{error}"[:MAX_PROMPT_CHARACTERS]
        seconds = {stage: round(float(spent), 6) for stage, spent in {**self._before, **self._seconds}.items()}
        here = round(time.monotonic() - self._began, 6)
        self._log.write({**self._facts, **outcome, "seconds": seconds, "seconds_here": here})

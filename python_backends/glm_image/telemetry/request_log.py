"""The request log: one JSON object per request, with its parameters, its outcome and its stage times."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from glm_image.errors import InvalidInputError, is_unsafe, status_of
from glm_image.lifecycle.context import NANOSECONDS, RequestContext, RequestObserver

FILE: Final = "GLM_IMAGE_REQUEST_LOG"
"""The environment variable that names the log file; without it, lines go to the server's log."""
PROMPTS: Final = "GLM_IMAGE_LOG_PROMPTS"
"""The environment variable that is 1 where lines may contain the text of prompts."""
MAX_PROMPT_CHARACTERS: Final = 1000
"""Of a prompt in a line: with 4 bytes each a line stays below the 4096 that Linux writes into a pipe in one piece."""


class RequestLog(RequestObserver):
    """Writes a line for each request of an instance when it ends.

    Args:
        instance: the name of the instance.
        is_last: whether successful requests end here; otherwise only failed ones get a line, as the next stage writes
            that of the others.
    """

    def __init__(self, instance: str, *, is_last: bool) -> None:
        path = os.environ.get(FILE)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o640) if path else sys.stderr.fileno()
        self._instance = instance
        self._is_last = is_last
        self._has_prompts = os.environ.get(PROMPTS) == "1"

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
        """Appends a line in one write, so that lines of several processes do not mix; ignores a log that is gone."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "event": "request", "instance": self._instance, **fields}
        with contextlib.suppress(OSError):
            os.write(self._file, _json_line(line).encode() + b"\n")


def _json_line(fields: Mapping[str, Any]) -> str:
    """Returns JSON in one line; letters of all scripts stay readable, unsafe characters are escaped as JSON does."""
    text = json.dumps(fields, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(json.dumps(character)[1:-1] if is_unsafe(character) else character for character in text)

"""The log of the stand-in in this process: what was launched, copied and waited for."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """Yields a list that has the events of the block when it ends."""
    library = ctypes.CDLL("libascendcl.so")
    library.standin_log_stop.restype = ctypes.c_char_p
    events: list[dict[str, Any]] = []
    torch.npu.synchronize()  # launches go through a queue
    library.standin_log_start()
    try:
        yield events
    finally:
        torch.npu.synchronize()
        text = library.standin_log_stop().decode()
        events.extend(json.loads(line) for line in text.splitlines())
        events.pop()  # the wait of this function


def operators(events: list[dict[str, Any]]) -> list[str]:
    """Returns the names of launched and captured tasks in their order."""
    return [event["name"] for event in events if event["kind"] in ("launch", "captured")]

"""Callbacks at deadlines, for a loop that waits in ``select``."""

from __future__ import annotations

import time
from collections.abc import Callable


class Timers:
    """Callbacks that are called once at a deadline; a callback has at most one deadline."""

    def __init__(self) -> None:
        self._deadlines: dict[Callable[[], None], float] = {}

    def start(self, callback: Callable[[], None], seconds: float) -> None:
        self._deadlines[callback] = time.monotonic() + seconds

    def start_at_most(self, callback: Callable[[], None], seconds: float) -> None:
        """Like ``start``, but keeps a deadline that is earlier."""
        self._deadlines[callback] = min(self._deadlines.get(callback, float("inf")), time.monotonic() + seconds)

    def cancel(self, callback: Callable[[], None]) -> None:
        self._deadlines.pop(callback, None)

    def is_running(self, callback: Callable[[], None]) -> bool:
        return callback in self._deadlines

    def seconds_left(self) -> float:
        return max(0.0, min(self._deadlines.values()) - time.monotonic())

    def run_due(self) -> None:
        now = time.monotonic()
        for callback in [callback for callback, deadline in self._deadlines.items() if now >= deadline]:
            self.cancel(callback)
            callback()

"""Restarts a server that breaks, on the same ports, until it breaks too often."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from glm_image.errors import ConfigurationError, GlmImageError
from glm_image.supervisor.flags import flag
from glm_image.supervisor.server import ServerStartError, TritonServer


class CrashLoopError(GlmImageError):
    """A server broke more often in a row than it may be restarted; the message holds the last reason."""


@dataclass(frozen=True)
class RestartPolicy:
    """Exponential backoff between restarts in a row.

    Attributes:
        max_restarts: 0 = never.
        first_seconds: the pause before the first restart; each further pause is twice as long.
        longest_seconds: the longest pause.
        steady_seconds: time of readiness after which the count of restarts starts anew.
    """

    max_restarts: int = flag("restarts in a row of a server that breaks (default: %(default)s)", "N", int, default=5)
    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    steady_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ConfigurationError(f"--max-restarts is {self.max_restarts}; allowed: 0 or more")

    def pause(self, restart: int) -> float:
        """Returns the seconds before a restart; ``restart`` counts those in a row, from 0."""
        return min(self.longest_seconds, self.first_seconds * 2.0 ** min(restart, 64))


def keep_running(
    server: TritonServer, policy: RestartPolicy, on_ready: Callable[[], None], log: Callable[[str], None]
) -> None:
    """Starts a server and restarts it whenever it breaks; returns when a requested stop is complete.

    ``on_ready`` is called each time it is ready, ``log`` with a line about each restart.

    Raises:
        ServerStartError: the first start failed.
        CrashLoopError: the server broke too often.
    """
    restarts, was_ready = 0, False
    while True:
        server.start()
        try:
            server.wait_ready()
            ready_since, was_ready = time.monotonic(), True
            on_ready()
            server.wait()
            reason = server.end_reason
            if time.monotonic() - ready_since >= policy.steady_seconds:
                restarts = 0
        except ServerStartError as error:
            server.clean_up()
            if not was_ready and not server.stop_requested:
                raise
            reason = str(error)
        if server.stop_requested:
            return
        if restarts >= policy.max_restarts:
            raise CrashLoopError(f"{reason}; restarts in a row before: {restarts}, as many as --max-restarts allows")
        pause = policy.pause(restarts)
        restarts += 1
        log(f"restart {restarts} of {policy.max_restarts} in {pause:g} s: {reason}")
        if server.wait_for_stop(pause):
            return

"""A server that is started again when it breaks, on the same ports, until it breaks too often."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from glm_image.errors import ConfigurationError, GlmImageError
from glm_image.supervisor.server import ServerStartError, TritonServer


class CrashLoopError(GlmImageError):
    """A server broke more often in a row than it is started again; the message has the last reason."""


@dataclass(frozen=True)
class RestartPolicy:
    """When to start a server again: after ``first_seconds``, then twice as long, up to ``longest_seconds``.

    Attributes:
        max_restarts: how often in a row; 0 = never.
        first_seconds: the pause before the first restart.
        longest_seconds: no pause is longer.
        steady_seconds: a server that was ready for so long broke for the first time.

    Raises:
        ConfigurationError: ``max_restarts`` is negative.
    """

    max_restarts: int = 5
    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    steady_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ConfigurationError(f"--max-restarts is {self.max_restarts}; allowed: 0 or more")

    def pause(self, restart: int) -> float:
        """Returns the seconds before the restart of that number in a row, from 0."""
        return min(self.longest_seconds, self.first_seconds * 2.0 ** min(restart, 64))


def keep_running(
    server: TritonServer, policy: RestartPolicy, on_ready: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Starts a server, and again whenever it ends unasked; returns when it was asked to end, and has.

    Args:
        server: not yet started.
        policy: when to start it again.
        on_ready: called each time it is ready.
        say: takes a line about each restart.

    Raises:
        ServerStartError: it could not be started the first time.
        CrashLoopError: it ended too often.
    """
    in_a_row, was_ready = 0, False
    while True:
        server.start()
        try:
            server.wait_ready()
            began, was_ready = time.monotonic(), True
            on_ready()
            server.wait()
            reason = server.end_reason
            if time.monotonic() - began >= policy.steady_seconds:
                in_a_row = 0
        except ServerStartError as error:
            server.clear_away()
            if not was_ready and not server.stop_requested:
                raise
            reason = str(error)
        if server.stop_requested:
            return
        if in_a_row >= policy.max_restarts:
            raise CrashLoopError(f"{reason}; restarts in a row before: {in_a_row}, as many as --max-restarts allows")
        pause = policy.pause(in_a_row)
        in_a_row += 1
        say(f"restart {in_a_row} of {policy.max_restarts} in {pause:g} s: {reason}")
        if server.wait_for_stop(pause):
            return

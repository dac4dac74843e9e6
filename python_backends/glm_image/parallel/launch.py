"""The worker processes of an instance: ranks other than 0, each on a device of its own."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from glm_image.ipc.child import child_environment, python_program
from glm_image.parallel.worker import WorkerSpec


class Worker:
    """A rank's process, the connection to it, and how many of its commands it has run."""

    def __init__(self, spec: WorkerSpec) -> None:
        parent_end, child_end = socket.socketpair()
        self._spec = spec
        self.connection: Connection = Connection(parent_end.detach())
        self._sent = self._done = 0
        self._waiting_since = 0.0
        with child_end:
            self._process = subprocess.Popen(
                [python_program(), "-m", "glm_image.parallel.worker", str(child_end.fileno())],
                pass_fds=(child_end.fileno(),),
                env=child_environment(),
                stdin=subprocess.DEVNULL,
            )
        self.connection.send(spec)

    def __str__(self) -> str:
        return f"rank {self._spec.rank} ({self._spec.display_name}, pid {self._process.pid})"

    def mark_sent(self) -> None:
        """Counts a command that is about to be sent."""
        if self._sent == self._done:
            self._waiting_since = time.monotonic()
        self._sent += 1

    def mark_done(self) -> None:
        """Counts a command that the worker has run."""
        self._done += 1
        self._waiting_since = time.monotonic()

    def seconds_until_hung(self, hang_seconds: float) -> float:
        """Returns the seconds left for the oldest unfinished command; ``hang_seconds`` while the worker is idle."""
        if self._sent == self._done:
            return hang_seconds
        return self._waiting_since + hang_seconds - time.monotonic()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """Returns the exit code of the process once it has ended, ``-N`` after signal N."""
        return self._process.wait()


def launch(specs: Sequence[WorkerSpec]) -> list[Worker]:
    """Starts one process per spec; kills those already started if one cannot be."""
    workers: list[Worker] = []
    try:
        workers.extend(Worker(spec) for spec in specs)
    except BaseException:
        for worker in workers:
            worker.kill()
            worker.wait()
        raise
    return workers

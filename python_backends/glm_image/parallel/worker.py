"""A rank other than 0: a process that runs the commands that rank 0 sends it."""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from glm_image.devices.open import open_device
from glm_image.errors import DeviceMemoryError, GlmImageError
from glm_image.parallel.commands import Done, Failed, LoadStage, Reached
from glm_image.parallel.process_group import Rendezvous, init_process_group
from glm_image.telemetry.logs import start_logging

logger = logging.getLogger(__name__)


class RankExecutor(Protocol):
    """Runs an engine's commands on one rank."""

    def run(self, command: Any, /) -> Any: ...

    def close(self) -> None:
        """Ends the work in progress and frees memory."""


Load = Callable[..., RankExecutor]
"""Makes a rank's executor from arguments, its device and its groups; a module-level function."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a rank's process loads, and where.

    Attributes:
        rank: its rank.
        device: the device's name in its process.
        display_name: the device's name in messages.
        rendezvous: how it joins the others.
        load: makes its executor.
        arguments: the first arguments of ``load``.
    """

    rank: int
    device: str
    display_name: str
    rendezvous: Rendezvous
    load: Load
    arguments: tuple[Any, ...]

    def start(self, on_stage: Callable[[LoadStage], None], store_socket: socket.socket | None = None) -> RankExecutor:
        """Joins the process group and loads the executor; calls ``on_stage`` after each stage."""
        device = open_device(self.device, display_name=self.display_name)
        device.set_current()
        on_stage(LoadStage.OPENED)
        ranks = init_process_group(self.rank, device, self.rendezvous, store_socket)
        on_stage(LoadStage.JOINED)
        executor = self.load(*self.arguments, device, ranks)
        on_stage(LoadStage.LOADED)
        return executor


def main() -> None:
    """Runs a worker on the connection whose file descriptor is the first argument.

    SIGUSR1 writes the stack of every thread to standard error.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when the workers end
        signal.signal(ignored, signal.SIG_IGN)
    connection: Connection = Connection(int(sys.argv[1]))
    spec: WorkerSpec = connection.recv()
    start_logging(f"rank {spec.rank} on {spec.display_name}")
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, commands), name="commands", daemon=True).start()
    try:
        executor = spec.start(lambda stage: connection.send(Reached(stage)))
        while True:
            _run(executor, commands.get())
            connection.send(Done())
    except Exception:  # rank 0 needs the reason, whatever it is
        logger.exception("this rank ends")
        with suppress(OSError):  # rank 0 has ended
            connection.send(Failed(traceback.format_exc(limit=-1).strip().splitlines()[-1]))
    finally:
        os._exit(1)  # a collective that others never join must not keep the process alive


def _run(executor: RankExecutor, command: Any) -> None:
    try:
        executor.run(command)
    except DeviceMemoryError:  # this rank's alone; others may be waiting for it in a collective
        raise
    except GlmImageError as error:  # raised by every rank alike
        logger.info("%s: %s", type(command).__name__, error)


def _receive(connection: Connection, commands: queue.SimpleQueue[Any]) -> None:
    # A thread, so that rank 0's end is seen while the main thread is in a collective.
    try:
        while True:
            commands.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    main()

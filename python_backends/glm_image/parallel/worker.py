"""A rank other than the first: a process that runs the commands its instance sends it."""

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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from glm_image.devices.open import open_device
from glm_image.errors import DeviceMemoryError, GlmImageError
from glm_image.parallel.messages import Done, Failed, LoadStage, Reached
from glm_image.parallel.process_group import Rendezvous, init_process_group

logger = logging.getLogger(__name__)


class RankExecutor(Protocol):
    """What runs an engine's commands."""

    def run(self, command: Any, /) -> Any:
        """Runs one command and returns its result."""

    def close(self) -> None:
        """Ends what it has started."""


Load = Callable[..., RankExecutor]


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is to be.

    Attributes:
        rank: its rank.
        device: its device, as its process names it.
        display_name: the device, as messages name it.
        rendezvous: where it meets the others.
        load: makes the rank's executor; a function of a module, called with ``arguments``, the device and the ranks.
        arguments: of ``load``.
    """

    rank: int
    device: str
    display_name: str
    rendezvous: Rendezvous
    load: Load
    arguments: tuple[Any, ...]

    def start(self, reached: Callable[[LoadStage], None], listening: socket.socket | None = None) -> RankExecutor:
        """Joins the others and loads the executor.

        Args:
            reached: called at each stage.
            listening: rank 0's socket.
        """
        device = open_device(self.device, display_name=self.display_name)
        device.set_current()
        reached(LoadStage.OPENED)
        ranks = init_process_group(self.rank, device, self.rendezvous, listening)
        reached(LoadStage.JOINED)
        executor = self.load(*self.arguments, device, ranks)
        reached(LoadStage.LOADED)
        return executor


def main() -> None:
    """Runs a worker on the connection whose file descriptor is the first argument.

    On SIGUSR1 it writes where each of its threads is to its standard error.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the first rank says when it is over
        signal.signal(ignored, signal.SIG_IGN)
    connection: Connection = Connection(int(sys.argv[1]))
    work: WorkerSpec = connection.recv()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {work.rank} on {work.display_name} %(message)s")
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, commands), name="commands", daemon=True).start()
    try:
        executor = work.start(lambda stage: connection.send(Reached(stage)))
        number = 0
        while True:
            _run(executor, commands.get())
            number += 1
            connection.send(Done(number))
    except Exception:  # whatever it is, the first rank must hear of it
        logger.exception("ends")
        _tell(connection, Failed(traceback.format_exc(limit=-1).strip().splitlines()[-1]))
    finally:
        os._exit(1)  # a collective that others never join must not keep the process alive


def _run(executor: RankExecutor, command: Any) -> None:
    try:
        executor.run(command)
    except DeviceMemoryError:  # this rank's own, and others may be waiting for it in a collective
        raise
    except GlmImageError as error:  # refused, by every rank alike
        logger.info("%s: %s", type(command).__name__, error)


def _receive(connection: Connection, commands: queue.SimpleQueue[Any]) -> None:
    # In a thread of its own, so that the first rank's end is seen while a collective waits for it.
    try:
        while True:
            commands.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _tell(connection: Connection, message: Failed) -> None:
    try:
        connection.send(message)
    except OSError:
        logger.info("the first rank is gone")


if __name__ == "__main__":
    main()

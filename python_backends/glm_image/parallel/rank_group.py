"""Rank 0's side of an instance that spans several devices: starts the other ranks and sends them its commands."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from glm_image.devices.base import Device
from glm_image.errors import ConfigurationError, DeviceMemoryError, GlmImageError, UnavailableError
from glm_image.parallel.commands import Command, LoadStage, R
from glm_image.parallel.launch import launch
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.process_group import Ranks, Rendezvous, bind_store
from glm_image.parallel.rank_monitor import RankMonitor
from glm_image.parallel.worker import Load, RankExecutor, WorkerSpec

logger = logging.getLogger(__name__)

LOAD_SECONDS = 900.0
"""Limit for loading all ranks: a checkpoint of tens of GB from a slow disk, and kernels to compile."""

COLLECTIVE_TIMEOUT_SECONDS = 1800.0
"""Timeout of a collective; longer than loading may take. Hangs are found earlier, by the monitor."""

_first_groups = itertools.count(step=1000)
"""Numbers of process groups, far enough apart for an instance. A later instance of this process must not use a name
again: torch's symmetric memory remembers the store of a group by the group's name."""


@dataclass(frozen=True)
class WorkerConfig:
    """The other devices of an instance, and the limits that its ranks must meet.

    Attributes:
        devices: the devices' names in this process; one rank each, after rank 0.
        display_names: the devices' names in messages; () = ``devices``.
        hang_seconds: a rank that runs one command for longer counts as hung.
        load_seconds: ranks that have not all loaded after this time count as hung.
        on_loss: called once, from the monitor's thread or a caller of ``run``, when a rank fails after all have loaded
            and all workers have been killed.
    """

    devices: tuple[str, ...] = ()
    display_names: tuple[str, ...] = ()
    hang_seconds: float = 60.0
    load_seconds: float = LOAD_SECONDS
    on_loss: Callable[[UnavailableError], None] = lambda _: None


NO_WORKERS = WorkerConfig()


def start_ranks(
    load: Load, arguments: tuple[Any, ...], device: Device, layout: ParallelLayout, workers: WorkerConfig = NO_WORKERS
) -> RankExecutor:
    """Loads an executor on every device of an instance.

    Args:
        load: makes a rank's executor.
        arguments: the first arguments of ``load``; pickled for the other ranks.
        device: of rank 0, this process.
        layout: the groups of ranks.
        workers: the other devices.

    Returns:
        The executor of ``device`` if it is the only one, else a ``RankGroup``.

    Raises:
        ConfigurationError: a rank could not load.
    """
    if not workers.devices:
        return load(*arguments, device, Ranks())
    with bind_store() as store_socket:  # closes nothing once the store has taken it over
        port = store_socket.getsockname()[1]
        rendezvous = Rendezvous(port, layout, COLLECTIVE_TIMEOUT_SECONDS, next(_first_groups))
        rank_0 = WorkerSpec(0, str(device.torch_device), str(device), rendezvous, load, arguments)
        names = zip(workers.devices, workers.display_names or workers.devices, strict=True)
        others = [WorkerSpec(rank, *name, rendezvous, load, arguments) for rank, name in enumerate(names, 1)]
        monitor = RankMonitor(
            launch(others), rendezvous.port, workers.hang_seconds, workers.load_seconds, workers.on_loss
        )
        try:
            executor = _load_rank_0(rank_0, store_socket, monitor)
            monitor.finish_loading()
        except BaseException:
            monitor.close()
            raise
    return RankGroup(executor, monitor)


def local_executor(executor: RankExecutor) -> Any:
    """Returns this process's executor, of the result of ``start_ranks``."""
    return executor.local if isinstance(executor, RankGroup) else executor


def _load_rank_0(spec: WorkerSpec, store_socket: socket.socket, monitor: RankMonitor) -> RankExecutor:
    """Loads this process's rank in a thread, which is abandoned if nothing ends its wait for a failed rank."""
    monitor.wait_for_workers(LoadStage.OPENED)  # most failures come before ranks wait for each other
    loaded: Future[RankExecutor] = Future()

    def load() -> None:
        try:
            loaded.set_result(spec.start(monitor.reach, store_socket))
        except BaseException as error:
            loaded.set_exception(error)
        monitor.notify()

    threading.Thread(target=load, name="loading", daemon=True).start()
    monitor.wait_until(loaded.done)
    error = loaded.exception()
    if isinstance(error, Exception) and not isinstance(error, GlmImageError):
        cause = monitor.root_cause(error)
        if cause is monitor.failure:
            raise ConfigurationError(str(cause)) from error
    return loaded.result()


class RankGroup:
    """The ranks of one instance, all loaded, as one executor; ``local`` is that of rank 0."""

    def __init__(self, executor: RankExecutor, monitor: RankMonitor) -> None:
        self.local, self._monitor = executor, monitor
        self._send_lock = threading.Lock()

    def run(self, command: Command[R]) -> R:
        """Runs a command on every rank; returns rank 0's result.

        Raises:
            UnavailableError: a rank has failed.
        """
        with self._send_lock:  # every rank gets the commands in the same order
            if self._monitor.failure is not None:
                raise self._monitor.failure
            for worker in self._monitor.workers:
                self._monitor.send(worker, command)
        try:
            result: R = self.local.run(command)
        except DeviceMemoryError as error:  # the other ranks may be waiting for this one in a collective
            self._monitor.fail(str(error))
            raise
        except GlmImageError:
            raise
        except Exception as error:
            raise self._monitor.root_cause(error) from error
        return result

    def close(self) -> None:
        """Closes rank 0's executor, which may need the other ranks for that, then ends the others."""
        try:
            if self._monitor.failure is None:
                self.local.close()
        except Exception:  # a rank or the device has failed meanwhile; the workers must be ended nevertheless
            logger.exception("rank 0 failed to close")
        self._monitor.close()

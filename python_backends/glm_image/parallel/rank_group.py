"""Rank 0's side of an instance that spans several devices: starts the others, tells them, and watches them."""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from glm_image.devices.base import Device
from glm_image.errors import ConfigurationError, DeviceMemoryError, GlmImageError, UnavailableError
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.messages import Done, Failed, LoadStage, Reached
from glm_image.parallel.process_group import Ranks, Rendezvous, abort, bind_store, destroy
from glm_image.parallel.worker import Load, RankExecutor, WorkerSpec

logger = logging.getLogger(__name__)

LOAD_SECONDS = 900.0
"""How long all ranks may take to load: a checkpoint of tens of GB from a slow disk, and kernels to compile."""

PATIENCE_SECONDS = 1800.0
"""How long a collective waits for ranks; longer than loading may take, and what hangs is noticed by its silence."""

LOSS_SECONDS = 2.0
"""How long after an error a rank's end is taken for its cause: collectives notice it before the watching thread."""


def ignore_loss(loss: UnavailableError) -> None:
    """For an engine whose ``run`` raises the error, which is all there is to do."""


@dataclass(frozen=True)
class WorkerConfig:
    """The other devices of an instance.

    Attributes:
        devices: their names in this process; one rank each, after the first.
        display_names: how messages name them; () = as ``devices``.
        hang_seconds: a rank that has not finished a command for so long is taken for hung.
        load_seconds: ranks that have not all loaded after so long are taken for hung.
        on_loss: called once, from a thread of its own, when a rank is lost after all have loaded; all others are ended
            before.
    """

    devices: tuple[str, ...] = ()
    display_names: tuple[str, ...] = ()
    hang_seconds: float = 60.0
    load_seconds: float = LOAD_SECONDS
    on_loss: Callable[[UnavailableError], None] = ignore_loss


NO_WORKERS = WorkerConfig()


def start_ranks(
    load: Load, arguments: tuple[Any, ...], device: Device, layout: ParallelLayout, workers: WorkerConfig = NO_WORKERS
) -> RankExecutor:
    """Loads an executor on one device, or on each of several that compute together.

    Args:
        load: makes a rank's executor of ``arguments``, its device and its ranks; a function of a module.
        arguments: what all ranks get; they are pickled.
        device: this process's.
        layout: how the ranks share the work.
        workers: the other devices.

    Raises:
        CheckpointError: a tensor is missing or has a wrong shape.
        ConfigurationError: a setting is not allowed, or a rank could not load.
    """
    if not workers.devices:
        return load(*arguments, device, Ranks())
    rendezvous = Rendezvous(0, layout, PATIENCE_SECONDS)
    works = [WorkerSpec(0, str(device.torch_device), str(device), rendezvous, load, arguments)]
    for rank, (inside, display_name) in enumerate(
        zip(workers.devices, workers.display_names or workers.devices, strict=True), 1
    ):
        works.append(WorkerSpec(rank, inside, display_name, rendezvous, load, arguments))
    return RankGroup(works, workers)


def local_executor(executor: RankExecutor) -> Any:
    """Returns the executor of this process, given what ``start_ranks`` returned."""
    return executor.local if isinstance(executor, RankGroup) else executor


class _Worker:
    """One rank's process, and what has been heard of it."""

    def __init__(self, work: WorkerSpec) -> None:
        ours, theirs = socket.socketpair()
        self.work = work
        self.stage = LoadStage.STARTED
        self.connection = Connection(ours.detach())
        self._sent = self._done = 0
        self._waiting_since = 0.0
        path = os.pathsep.join(entry for entry in sys.path if entry)
        with theirs:
            self.process = subprocess.Popen(
                [_interpreter(), "-m", "glm_image.parallel.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
            )
        self.connection.send(work)

    def __str__(self) -> str:
        return f"rank {self.work.rank} ({self.work.display_name}, pid {self.process.pid})"

    def told(self) -> None:
        """Notes that it is being told to run a command."""
        if self._sent == self._done:
            self._waiting_since = time.monotonic()
        self._sent += 1

    def heard(self, message: Reached | Done) -> None:
        """Notes what it has told."""
        if isinstance(message, Done):
            self._done, self._waiting_since = message.number, time.monotonic()
        else:
            self.stage = message.stage

    def seconds_left(self, hang_seconds: float) -> float:
        """Returns how long it may go on without a word before it is taken for hung."""
        if self._sent == self._done:
            return hang_seconds
        return self._waiting_since + hang_seconds - time.monotonic()


class RankGroup:
    """The ranks of one instance; ``run`` is the executor of all of them.

    Args:
        works: what every rank does, this process's first; the port is filled in here.
        workers: when a rank is taken for lost, and whom to tell.

    Attributes:
        local: this process's executor, rank 0's.

    Raises:
        ConfigurationError: a rank could not load.
    """

    def __init__(self, works: Sequence[WorkerSpec], workers: WorkerConfig) -> None:
        self._hang_seconds, self._on_loss = workers.hang_seconds, workers.on_loss
        self._load_seconds, self._started = workers.load_seconds, time.monotonic()
        self._lost: UnavailableError | None = None
        self._loaded = self._closing = False
        self._stage = LoadStage.STARTED
        self._turn = threading.Lock()
        self._news = threading.Condition()
        listening = bind_store()
        self._port = listening.getsockname()[1]
        rendezvous = replace(works[0].rendezvous, port=self._port)
        works = [replace(work, rendezvous=rendezvous) for work in works]
        self._wake, self._woken = Pipe()
        self._workers: list[_Worker] = []
        self._watching = threading.Thread(target=self._watch, name="ranks", daemon=True)
        try:
            self._workers.extend(_Worker(each) for each in works[1:])
            self._watching.start()
            self.local = self._load(works[0], listening)
            self._wait_until_all(LoadStage.LOADED)
            self._loaded = True
            logger.info("%d ranks loaded in %.1f s", len(works), time.monotonic() - self._started)
        except BaseException:
            listening.close()
            self.close()
            raise

    def run(self, command: Any) -> Any:
        """Runs a command on every rank; returns this rank's result.

        Raises:
            UnavailableError: a rank is lost.
        """
        with self._turn:  # the same order on every rank
            if self._lost is not None:
                raise self._lost
            for worker in self._workers:
                self._send(worker, command)
        try:
            return self.local.run(command)
        except DeviceMemoryError as error:  # the other ranks may be waiting for this one in a collective
            self._lose(str(error))
            raise
        except GlmImageError:
            raise
        except Exception as error:
            raise self._cause(error) from error

    def _cause(self, error: Exception) -> Exception:
        """Returns why a command failed here: the loss of a rank if that is heard of now, else the error itself."""
        with self._news:
            self._news.wait_for(lambda: self._lost is not None, LOSS_SECONDS)
            return self._lost or error

    def close(self) -> None:
        """Ends what runs here, which may need the other ranks to end, and then those."""
        try:
            if self._loaded and self._lost is None:
                self.local.close()
        except Exception:  # a rank is lost meanwhile, or the device; the others must end all the same
            logger.exception("rank 0 did not end well")
        self._closing = True
        self._wake.send(None)
        for worker in self._workers:  # all before any is waited for, or those in a collective tell of the others' end
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        if self._lost is None:
            destroy()
        elif self._watching is not threading.current_thread():
            self._watching.join(LOSS_SECONDS)  # which leaves

    def _send(self, worker: _Worker, command: Any) -> None:
        with self._news:
            worker.told()
        try:
            worker.connection.send(command)  # may wait for a rank that does not read, which the watching thread ends
        except OSError as error:
            raise self._cause(UnavailableError(f"{worker} is gone")) from error

    def _load(self, work: WorkerSpec, listening: socket.socket) -> RankExecutor:
        """Loads this process's rank, in a thread that is left behind where nothing ends its wait for a lost rank."""
        self._wait_until_all(LoadStage.OPENED)  # most of what can fail fails before ranks wait for each other
        loaded: Future[RankExecutor] = Future()

        def load() -> None:
            try:
                loaded.set_result(work.start(self._reach, listening))
            except BaseException as error:
                loaded.set_exception(error)
            with self._news:
                self._news.notify_all()

        threading.Thread(target=load, name="loading", daemon=True).start()
        with self._news:
            self._news.wait_for(lambda: self._lost or loaded.done())
        if not loaded.done():
            raise ConfigurationError(str(self._lost))
        error = loaded.exception()
        if error is None:
            return loaded.result()
        if isinstance(error, Exception) and not isinstance(error, GlmImageError):
            cause = self._cause(error)
            if cause is self._lost:
                raise ConfigurationError(str(cause)) from error
        raise error

    def _reach(self, stage: LoadStage) -> None:
        self._stage = stage
        logger.info("rank 0 has %s after %.1f s", stage.label, time.monotonic() - self._started)

    def _wait_until_all(self, stage: LoadStage) -> None:
        with self._news:
            self._news.wait_for(lambda: self._lost or all(worker.stage >= stage for worker in self._workers))
            if self._lost is not None:
                raise ConfigurationError(str(self._lost))

    def _watch(self) -> None:
        by_connection = {worker.connection: worker for worker in self._workers}
        while not self._closing and self._lost is None:
            for connection in wait([*by_connection, self._woken], self._seconds_left()):
                worker = by_connection.get(connection)  # type: ignore[call-overload]
                if worker is not None and not self._closing:
                    self._hear(worker)
            if self._loading_seconds_left() <= 0:
                self._lose(f"{self._load_seconds:g} s after the start {self._behind()}")
            for worker in self._workers:
                if worker.seconds_left(self._hang_seconds) <= 0:
                    self._lose(f"{worker} has not finished a command for {self._hang_seconds:g} s")

    def _seconds_left(self) -> float | None:
        left = [worker.seconds_left(self._hang_seconds) for worker in self._workers]
        seconds = min([*left, self._loading_seconds_left()])
        return None if seconds == math.inf else max(seconds, 0.0)

    def _loading_seconds_left(self) -> float:
        return math.inf if self._loaded else self._started + self._load_seconds - time.monotonic()

    def _behind(self) -> str:
        """Tells which ranks have not loaded, and how far they are."""
        stages = {"rank 0, this process,": self._stage, **{str(worker): worker.stage for worker in self._workers}}
        return " and ".join(
            f"{name} has not {stage.next.label}" for name, stage in stages.items() if stage < LoadStage.LOADED
        )

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            code = worker.process.wait()
            self._lose(f"{worker} was ended by signal {-code}" if code < 0 else f"{worker} ended with code {code}")
            return
        if isinstance(message, Failed):
            self._lose(f"{worker} ended with {message.error}")
            return
        with self._news:
            worker.heard(message)
            self._news.notify_all()
        if isinstance(message, Reached):
            logger.info("%s has %s after %.1f s", worker, message.stage.label, time.monotonic() - self._started)

    def _lose(self, why: str) -> None:
        then = "the instance starts anew, send the request again" if self._loaded else "the instance cannot be loaded"
        with self._news:
            if self._lost is not None or self._closing:
                return
            self._lost = UnavailableError(f"{why}; {then}")
            self._news.notify_all()
        logger.error("%s", self._lost)
        for each in self._workers:
            each.process.kill()
        if self._loaded:
            self._on_loss(self._lost)
        abort(self._port)


def _interpreter() -> str:
    # A Triton stub embeds Python, and its sys.executable may be the stub itself.
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return str(Path(sys.prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")

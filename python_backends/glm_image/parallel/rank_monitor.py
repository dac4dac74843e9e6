"""Watches the workers of an instance: their load stages, errors, deaths and hangs."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from glm_image.errors import ConfigurationError, UnavailableError
from glm_image.parallel.commands import Done, Failed, LoadStage, Reached
from glm_image.parallel.launch import Worker
from glm_image.parallel.process_group import abort, destroy

logger = logging.getLogger(__name__)

ROOT_CAUSE_SECONDS = 2.0
"""A rank that ends within this time of an error caused it: collectives notice a death before the monitor does."""

RANK_0 = "rank 0, this process,"


class RankMonitor:
    """A thread that ends the whole group as soon as one of its ranks fails.

    The limits and ``on_loss`` are those of ``WorkerConfig``; ``port`` is that of rank 0's store.

    Attributes:
        failure: the error of every later command; None while all ranks work.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        port: int,
        hang_seconds: float,
        load_seconds: float,
        on_loss: Callable[[UnavailableError], None],
    ) -> None:
        self.workers = workers
        self.failure: UnavailableError | None = None
        self._port, self._on_loss = port, on_loss
        self._hang_seconds, self._load_seconds = hang_seconds, load_seconds
        self._started = time.monotonic()
        self._stages = {RANK_0: LoadStage.STARTED, **{str(worker): LoadStage.STARTED for worker in workers}}
        self._loading, self._closing = True, False
        self._changed = threading.Condition()
        self._wake_sender, self._wake_receiver = Pipe()
        self._thread = threading.Thread(target=self._watch, name="rank-monitor", daemon=True)
        self._thread.start()

    def send(self, worker: Worker, command: Any) -> None:
        """Sends a command; may block on a worker that does not read, until ``hang_seconds`` have passed.

        Raises:
            UnavailableError: a rank has failed.
        """
        with self._changed:
            worker.mark_sent()
        try:
            worker.connection.send(command)
        except OSError as error:
            raise self.root_cause(UnavailableError(f"{worker} has ended")) from error

    def reach(self, stage: LoadStage, rank: str = RANK_0) -> None:
        with self._changed:
            self._stages[rank] = stage
            self._changed.notify_all()
        logger.info("%s has %s after %.1f s", rank, stage.label, time.monotonic() - self._started)

    def notify(self) -> None:
        """Makes ``wait_until`` evaluate its predicate again."""
        with self._changed:
            self._changed.notify_all()

    def wait_until(self, predicate: Callable[[], bool]) -> None:
        """Waits for ``predicate``, which is evaluated after every event.

        Raises:
            ConfigurationError: a rank has failed first.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or predicate())
            if not predicate():
                raise ConfigurationError(str(self.failure))

    def wait_for_workers(self, stage: LoadStage) -> None:
        """Waits as ``wait_until`` does, until every worker has reached a stage."""
        ranks = [str(worker) for worker in self.workers]
        self.wait_until(lambda: self.failure is None and all(self._stages[rank] >= stage for rank in ranks))

    def finish_loading(self) -> None:
        """Waits as ``wait_until`` does, until every worker has loaded; later failures are reported to ``on_loss``."""
        with self._changed:
            self.wait_for_workers(LoadStage.LOADED)
            self._loading = False
        logger.info("%d ranks loaded in %.1f s", len(self._stages), time.monotonic() - self._started)

    def root_cause(self, error: Exception) -> Exception:
        """Returns why a command failed on rank 0: another rank's failure if one follows shortly, else ``error``."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, ROOT_CAUSE_SECONDS)
            return self.failure or error

    def fail(self, reason: str) -> None:
        """Kills every worker and ends what waits for them in this process; only the first call has an effect."""
        consequence = (
            "the instance cannot be loaded" if self._loading else "the instance starts anew, send the request again"
        )
        with self._changed:
            if self.failure is not None or self._closing:
                return
            failure = self.failure = UnavailableError(f"{reason}; {consequence}")
            self._changed.notify_all()
        logger.error("%s", failure)
        for worker in self.workers:
            worker.kill()
        if not self._loading:
            self._on_loss(failure)
        abort(self._port)

    def close(self) -> None:
        """Kills the workers, waits for them, and destroys the process group."""
        self._closing = True
        self._wake_sender.send(None)
        for worker in self.workers:  # all of them first: one that waits in a collective would report another's death
            worker.kill()
        for worker in self.workers:
            worker.wait()
        if self.failure is None:
            destroy()
        elif self._thread is not threading.current_thread():
            self._thread.join(ROOT_CAUSE_SECONDS)  # it aborts the process group

    def _watch(self) -> None:
        by_connection = {worker.connection: worker for worker in self.workers}
        while not self._closing and self.failure is None:
            for connection in wait([*by_connection, self._wake_receiver], self._seconds_to_wait()):
                worker = by_connection.get(connection)  # type: ignore[call-overload]
                if worker is not None and not self._closing:
                    self._receive(worker)
            if self._seconds_to_load() <= 0:
                self.fail(f"{self._load_seconds:g} s after the start {self._describe_unloaded()}")
            for worker in self.workers:
                if worker.seconds_until_hung(self._hang_seconds) <= 0:
                    self.fail(f"{worker} has not finished a command for {self._hang_seconds:g} s")

    def _receive(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            code = worker.wait()
            self.fail(f"{worker} was ended by signal {-code}" if code < 0 else f"{worker} ended with code {code}")
            return
        match message:
            case Failed(error):
                self.fail(f"{worker} ended with {error}")
            case Reached(stage):
                self.reach(stage, str(worker))
            case Done():
                with self._changed:
                    worker.mark_done()

    def _seconds_to_wait(self) -> float | None:
        deadlines = [worker.seconds_until_hung(self._hang_seconds) for worker in self.workers]
        seconds = min([*deadlines, self._seconds_to_load()])
        return None if seconds == math.inf else max(seconds, 0.0)

    def _seconds_to_load(self) -> float:
        return self._started + self._load_seconds - time.monotonic() if self._loading else math.inf

    def _describe_unloaded(self) -> str:
        unloaded = ((rank, stage) for rank, stage in self._stages.items() if stage < LoadStage.LOADED)
        return " and ".join(f"{rank} has not {LoadStage(stage + 1).label}" for rank, stage in unloaded)

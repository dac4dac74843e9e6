"""The thread of the AR engine: every command of the executor runs in it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future

from glm_image.ar.scheduler import Scheduler
from glm_image.ar.sequence import ArResult, Request
from glm_image.errors import UnavailableError


class SchedulerThread:
    """Steps a scheduler in a thread of its own, and sleeps while the scheduler has nothing to do.

    ``prepare`` is called in the thread before the first request, and waited for; its error is raised.
    """

    def __init__(self, scheduler: Scheduler, prepare: Callable[[], None] = lambda: None) -> None:
        self._scheduler = scheduler
        self._changed = threading.Condition()
        scheduler.admission.when_changed(self._wake)
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(prepare, ready), name="ar-scheduler", daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, request: Request) -> Future[ArResult]:
        future = self._scheduler.submit(request)
        self._wake()
        return future

    def is_alive(self) -> bool:
        """Whether the thread runs; does not return while another thread holds the lock."""
        with self._changed:
            return self._thread.is_alive()

    def close(self) -> None:
        """Ends all requests with UnavailableError and stops the thread."""
        self._scheduler.stop()
        self._wake()
        self._thread.join()

    def _run(self, prepare: Callable[[], None], ready: Future[None]) -> None:
        try:
            prepare()
        except Exception as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        self._loop()

    def _loop(self) -> None:
        reason: Exception = UnavailableError("glm_ar is stopping; send the request again")
        try:
            while self._wait_for_work():
                self._scheduler.step()
        except Exception as error:  # a fault of the scheduler itself
            reason = error
            raise
        finally:
            self._scheduler.end_all(reason)

    def _wait_for_work(self) -> bool:
        """Returns whether there is a next step; False once the scheduler is stopping."""
        with self._changed:
            while not self._scheduler.is_stopping and (seconds := self._scheduler.next_wait()):
                self._changed.wait(None if seconds == math.inf else seconds)
            return not self._scheduler.is_stopping

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

"""Small pictures in few steps, for people who wait: painted while nobody paints, or between two steps of a picture.

They never make anybody wait for long: their number is bounded, and while pictures are painted so is their share of the
device's time. What is over that is refused rather than queued.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glm_image.dit.metrics import DROPPED_PREVIEWS, PREVIEWS
from glm_image.errors import GlmImageError, QueueFullError, UnavailableError
from glm_image.lifecycle.context import RequestContext
from glm_image.request.parameters import PaintRequest
from glm_image.telemetry.metrics import MetricSink

MAX_WAITING = 8
SHARE = 0.05
"""Of the time in which pictures are painted, what previews may take."""
SAVED_SECONDS = 1.0
"""The most of their share that previews may use at once."""

Paint = Callable[[RequestContext, PaintRequest], NDArray[np.uint8]]


@dataclass(eq=False)
class _Wanted:
    context: RequestContext
    request: PaintRequest
    future: Future[NDArray[np.uint8]] = field(default_factory=Future)


class Previews:
    """The previews that wait, and who paints them.

    Args:
        paint: paints one; the device is free for it.
        device_is_free: held by whoever uses the device.
        record: counts them.
    """

    def __init__(self, paint: Paint, device_is_free: threading.Lock, record: MetricSink) -> None:
        self._paint = paint
        self._device_is_free = device_is_free
        self._record = record
        self._waiting: deque[_Wanted] = deque()
        self._changed = threading.Condition()
        self._painters = 0
        self._left = SAVED_SECONDS
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, context: RequestContext, request: PaintRequest) -> Future[NDArray[np.uint8]]:
        """Queues a preview; its future gives uint8 [height, width, 3], or the error it ended with.

        Raises:
            QueueFullError: there are too many, or too much is painted.
            UnavailableError: the engine is closed.
        """
        wanted = _Wanted(context, request)
        with self._changed:
            if self._closed:
                raise UnavailableError("glm_dit is stopping; no previews are painted")
            if len(self._waiting) >= MAX_WAITING or (self._painters and self._left <= 0):
                self._record(DROPPED_PREVIEWS, 1)
                raise QueueFullError("glm_dit is too busy for another preview")
            self._waiting.append(wanted)
            if self._thread is None:  # where nobody asks for previews there is none
                self._thread = threading.Thread(target=self._paint_while_idle, name="dit-previews", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return wanted.future

    @contextlib.contextmanager
    def painting(self) -> Iterator[None]:
        """While somebody paints, or wants to, only ``between_steps`` paints previews."""
        with self._changed:
            self._painters += 1
        try:
            yield
        finally:
            with self._changed:
                self._painters -= 1
                self._changed.notify_all()

    def between_steps(self, seconds: float) -> None:
        """Paints what waits, if it may, for somebody who holds the device and has just taken a step in ``seconds``."""
        self._left = min(self._left + SHARE * seconds, SAVED_SECONDS)
        while self._waiting and self._left > 0:
            began = time.monotonic()
            self._paint_next()
            self._left -= time.monotonic() - began

    def close(self) -> None:
        """Ends what waits with UnavailableError."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for wanted in waiting:
            wanted.future.set_exception(UnavailableError("glm_dit is stopping; no previews are painted"))
        if self._thread is not None:
            self._thread.join()

    def _paint_while_idle(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._waiting and not self._painters))
                if self._closed:
                    return
            with self._device_is_free:
                self._paint_next()

    def _paint_next(self) -> None:
        with self._changed:
            if not self._waiting:
                return
            wanted = self._waiting.popleft()
        try:
            pixels = self._paint(wanted.context, wanted.request)
        except Exception as error:  # it is nobody else's
            self._record(DROPPED_PREVIEWS, 1)
            if isinstance(error, GlmImageError):
                error.__traceback__ = None  # its frames hold the request, which holds the error
            wanted.future.set_exception(error)
            return
        self._record(PREVIEWS, 1)
        wanted.future.set_result(pixels)

"""Renders previews: small images in few steps, while no request is denoised or between two steps of one.

Their number is bounded, and so is their share of the device's time while requests are denoised; previews beyond that
are refused, not queued.
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
from glm_image.request.geometry import Grid
from glm_image.request.parameters import PaintRequest
from glm_image.telemetry.metrics import MetricSink

MAX_WAITING = 8
TIME_SHARE = 0.05
"""Of the time in which requests are denoised, what previews may take."""
MAX_BUDGET_SECONDS = 1.0
"""The most unused time that previews may save up."""


def within_codebook(token_ids: NDArray[np.int32], grid: Grid, codebook_size: int) -> tuple[NDArray[np.int32], int]:
    """Replaces ids beyond the codebook by that of the nearest valid token in the grid.

    Args:
        token_ids: int32 [1, grid.tokens].
        grid: the rows and columns of the tokens.
        codebook_size: valid ids are 0 and above, and below it.

    Returns:
        The ids, int32 [1, grid.tokens], and how many were replaced. Without any valid token all are 0.
    """
    is_valid = ((token_ids[0] >= 0) & (token_ids[0] < codebook_size)) if token_ids.size == grid.tokens else None
    if is_valid is None or is_valid.all():  # of another shape, which the check of the request refuses
        return token_ids, 0
    places = np.stack(np.divmod(np.arange(grid.tokens), grid.width), axis=-1)
    valid, invalid = np.flatnonzero(is_valid), np.flatnonzero(~is_valid)
    replaced = token_ids.copy()
    if valid.size:
        distances = ((places[invalid, None] - places[None, valid]) ** 2).sum(axis=-1)
        replaced[0, invalid] = token_ids[0, valid[distances.argmin(axis=1)]]
    else:
        replaced[:] = 0
    return replaced, int(invalid.size)


Render = Callable[[RequestContext, PaintRequest], NDArray[np.uint8]]


@dataclass(eq=False)
class _Pending:
    context: RequestContext
    request: PaintRequest
    future: Future[NDArray[np.uint8]] = field(default_factory=Future)


class Previews:
    """The queue of previews, and the thread that renders them while the device is idle.

    ``render`` is called while ``device_is_free``, which is held while the device is in use.
    """

    def __init__(self, render: Render, device_is_free: threading.Lock, record: MetricSink) -> None:
        self._render = render
        self._device_is_free = device_is_free
        self._record = record
        self._waiting: deque[_Pending] = deque()
        self._changed = threading.Condition()
        self._requests = 0
        self._budget_seconds = MAX_BUDGET_SECONDS
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, context: RequestContext, request: PaintRequest) -> Future[NDArray[np.uint8]]:
        """Queues a preview; its future resolves to uint8 [height, width, 3], or to the error it ended with.

        Raises:
            QueueFullError: too many previews wait, or requests leave no time for them.
            UnavailableError: the engine is closed.
        """
        pending = _Pending(context, request)
        with self._changed:
            if self._closed:
                raise _closed_error()
            if len(self._waiting) >= MAX_WAITING or (self._requests and self._budget_seconds <= 0):
                self._record(DROPPED_PREVIEWS, 1)
                raise QueueFullError("glm_dit is too busy for another preview")
            self._waiting.append(pending)
            if self._thread is None:  # started by the first preview
                self._thread = threading.Thread(target=self._render_while_idle, name="dit-previews", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return pending.future

    @contextlib.contextmanager
    def requests_first(self) -> Iterator[None]:
        """While a request is denoised or waits for the device, previews are rendered by ``between_steps`` only."""
        with self._changed:
            self._requests += 1
        try:
            yield
        finally:
            with self._changed:
                self._requests -= 1
                self._changed.notify_all()

    def between_steps(self, seconds: float) -> None:
        """Renders previews within their budget; called by the holder of the device after a step of ``seconds``."""
        self._budget_seconds = min(self._budget_seconds + TIME_SHARE * seconds, MAX_BUDGET_SECONDS)
        while self._waiting and self._budget_seconds > 0:
            started = time.monotonic()
            self._render_next()
            self._budget_seconds -= time.monotonic() - started

    def close(self) -> None:
        """Fails the waiting previews with UnavailableError."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for pending in waiting:
            pending.future.set_exception(_closed_error())
        if self._thread is not None:
            self._thread.join()

    def _render_while_idle(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._waiting and not self._requests))
                if self._closed:
                    return
            with self._device_is_free:
                self._render_next()

    def _render_next(self) -> None:
        with self._changed:
            if not self._waiting:
                return
            pending = self._waiting.popleft()
        try:
            pixels = self._render(pending.context, pending.request)
        except Exception as error:  # fails this preview only
            self._record(DROPPED_PREVIEWS, 1)
            if isinstance(error, GlmImageError):
                error.__traceback__ = None  # its frames hold the request, which holds the error
            pending.future.set_exception(error)
            return
        self._record(PREVIEWS, 1)
        pending.future.set_result(pixels)


def _closed_error() -> UnavailableError:
    return UnavailableError("glm_dit is stopping; no previews are rendered")

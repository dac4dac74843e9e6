"""A request in flight: its id, deadline, cancel flag, stage times and progress, and the observers of all of it."""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_image.errors import CancelledError, DeadlineExceededError, GlmImageError, shown
from glm_image.request.stages import Stage

logger = logging.getLogger(__name__)

NANOSECONDS = 1_000_000_000
LATEST_DEADLINE_NS = 2**63 - 1
"""The largest deadline that its INT64 tensor holds; longer timeouts are cut to it."""


@dataclass(frozen=True)
class Progress:
    """The progress of a request within a stage.

    Attributes:
        done: prompts read, tokens sampled or denoising steps taken, over all images of the request.
        total: the value of ``done`` at the end of the stage.
        sigma: the noise level of the image being denoised, 1 to 0.
        seconds_left: the expected time to the end of the stage; None = unknown.
    """

    stage: Stage
    done: int
    total: int
    sigma: float | None = None
    seconds_left: float | None = None


class RequestObserver:
    """Receives the events of a request; each method does nothing unless a subclass overrides it.

    Methods are called in the thread that causes the event, often the engine's, so they must return quickly. An
    exception is logged and reaches neither the engine nor the other observers. No observer may rely on the order in
    which observers are called.
    """

    def started(self, context: RequestContext) -> None:
        """The stage has accepted the request and is about to work on it; cancelling it from here ends it."""

    def progressed(self, context: RequestContext, progress: Progress) -> None:
        """The engine made progress. Overriding this makes ``RequestContext.is_watched`` true."""

    def stage_finished(self, context: RequestContext, stage: Stage, seconds: float) -> None:
        """A stage ended, or a part of it: most stages have one part per image."""

    def preview_sampled(self, context: RequestContext, tokens: NDArray[np.int32]) -> None:
        """The AR sampled the first image's preview, int32 [tokens]; at most once.

        Overriding this makes ``RequestContext.wants_preview`` true.
        """

    def latent_preview_rendered(self, context: RequestContext, pixels: NDArray[np.uint8]) -> None:
        """The DiT rendered a latent preview of the image being denoised, uint8 [height, width, 3]."""

    def latent_preview_skipped(self, context: RequestContext, error: GlmImageError) -> None:
        """The DiT could not render a latent preview; the request goes on."""

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        """The request ended, and its response is about to be sent; called once, even if it never started."""


class ProgressCallback(RequestObserver):
    """Calls a function with each progress."""

    def __init__(self, callback: Callable[[Progress], object]) -> None:
        self._callback = callback

    def progressed(self, context: RequestContext, progress: Progress) -> None:
        self._callback(progress)


@dataclass(eq=False)
class RequestContext:
    """A request in flight, shared by the engine's thread, the thread that serves it and those that may cancel it.

    Attributes:
        id: the caller's request id, or a generated one.
        deadline_ns: the ``time.monotonic_ns()`` by which the request must end; 0 = none.
        arrived_ns: the ``time.monotonic_ns()`` at which it reached the server; distinguishes requests of one id.
        accepted_ns: the ``time.monotonic_ns()`` at which it reached this stage.
        queue_began_ns: the ``time.monotonic_ns()`` before which nothing waited for this stage; 0 = unknown.
        input_bytes: the bytes of its inputs, which the server holds until its end.
        received_ns: the ``time.monotonic_ns()`` from which its latency counts: at which it reached the first stage, or
            this one if a client calls it directly.
        attributes: its parameters, for the request log.
        is_abandoned: returns whether the caller has disconnected.
        progress: returns the current progress; callable from any thread.
        is_watched: whether an observer receives progress. Engines skip ``publish_progress`` otherwise.
        wants_preview: whether an observer waits for the preview's tokens.
        seconds: wall-clock seconds by stage.
        latent_preview_every: denoising steps between two latent previews; 0 = none.
        cached_steps: denoising steps that the cache skipped, one entry per image denoised so far.
        observers: changed with ``add_observer`` and ``remove_observer``.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    deadline_ns: int = 0
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    accepted_ns: int = field(default_factory=time.monotonic_ns)
    queue_began_ns: int = 0
    received_ns: int = field(default_factory=time.monotonic_ns)
    num_images: int = 1
    input_bytes: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)
    is_abandoned: Callable[[], bool] = bool
    progress: Callable[[], Progress] = lambda: Progress(Stage.AR_QUEUE, 0, 1)
    is_watched: bool = field(default=False, init=False)
    wants_preview: bool = field(default=False, init=False)
    seconds: dict[Stage, float] = field(default_factory=dict)
    latent_preview_every: int = 0
    cached_steps: list[int] = field(default_factory=list)
    observers: tuple[RequestObserver, ...] = ()
    _preview_is_sampled: bool = field(default=False, init=False, repr=False)
    _is_finished: bool = field(default=False, init=False, repr=False)
    _cancelled: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    _on_cancel: Callable[[], None] | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._set_observers(tuple(self.observers))

    @classmethod
    def with_timeout(cls, request_id: str, timeout_us: int) -> RequestContext:
        """Creates the context of a request from its id ("" = generate one) and timeout in microseconds (0 = none)."""
        context = cls(id=request_id or uuid.uuid4().hex)
        context.limit(timeout_us)
        return context

    def limit(self, timeout_us: int) -> None:
        """Sets the deadline to ``timeout_us`` microseconds after the arrival; 0 = no deadline."""
        self.deadline_ns = min(self.arrived_ns + timeout_us * 1000, LATEST_DEADLINE_NS) if timeout_us > 0 else 0

    def add_observer(self, observer: RequestObserver) -> None:
        with self._lock:
            self._set_observers((*self.observers, observer))

    def remove_observer(self, observer: RequestObserver) -> None:
        with self._lock:
            self._set_observers(tuple(other for other in self.observers if other is not observer))

    def _set_observers(self, observers: tuple[RequestObserver, ...]) -> None:
        self.observers = observers
        self.is_watched = any(_overrides(observer, "progressed") for observer in observers)
        self.wants_preview = not self._preview_is_sampled and any(
            _overrides(observer, "preview_sampled") for observer in observers
        )

    def start(self, stage: Stage) -> None:
        """Notifies the observers that the request starts at ``stage``.

        Raises:
            CancelledError: it has been cancelled, by an observer or before.
        """
        self._notify(lambda observer: observer.started(self))
        self.report(stage, 0, 1)
        if self.cancelled:
            self.check()

    def finish(self, error: BaseException | None = None) -> None:
        """Notifies the observers that the request ended, with ``error`` or well; only the first call counts."""
        with self._lock:
            if self._is_finished:
                return
            self._is_finished = True
            self._on_cancel = None  # it may refer to the request, which refers to this context
        self._notify(lambda observer: observer.finished(self, error))

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Cancels the request: a waiting one ends immediately, a running one at the engine's next ``check``."""
        self._cancelled.set()
        callback = self._on_cancel
        if callback is not None:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Sets the callback to run on cancellation, replacing any earlier one; runs it now if already cancelled."""
        with self._lock:
            if not self._is_finished:
                self._on_cancel = callback
        if self.cancelled:
            callback()

    def check(self, needed_seconds: float = 0.0) -> None:
        """Raises if the request must not go on; its remaining work takes at least ``needed_seconds``.

        Raises:
            CancelledError: it was cancelled.
            DeadlineExceededError: its deadline has passed, or comes before the remaining work can be done.
        """
        if self.cancelled:
            raise CancelledError(f"request {shown(self.id)} was cancelled")
        if not self.deadline_ns:
            return
        left = (self.deadline_ns - time.monotonic_ns()) / NANOSECONDS
        if left < 0:
            raise DeadlineExceededError(f"request {shown(self.id)} is {-left:.3f} s past {self._deadline_text()}")
        if left < needed_seconds:
            raise DeadlineExceededError(
                f"request {shown(self.id)} cannot meet {self._deadline_text()}: the remaining work takes at "
                f"least {needed_seconds:.3f} s, {left:.3f} s are left, {needed_seconds - left:.3f} s too few"
            )

    def _deadline_text(self) -> str:
        return f"its deadline, {(self.deadline_ns - self.arrived_ns) / NANOSECONDS:g} s after its arrival"

    def seconds_to_spare(self, needed_seconds: float) -> float:
        """Returns after how many seconds ``check`` with these needed seconds raises; inf without a deadline."""
        if not self.deadline_ns:
            return math.inf
        return max(0.0, (self.deadline_ns - time.monotonic_ns()) / NANOSECONDS - needed_seconds)

    def report(
        self, stage: Stage, done: int, total: int, sigma: float | None = None, seconds_left: float | None = None
    ) -> None:
        progress = Progress(stage, done, total, sigma, seconds_left)
        self.progress = lambda: progress
        self.publish_progress()

    def publish_progress(self) -> None:
        if self.is_watched:
            progress = self.progress()
            self._notify(lambda observer: observer.progressed(self, progress))

    def publish_preview(self, tokens: NDArray[np.int32]) -> None:
        """Passes the first image's preview to the observers, int32 [tokens]; only the first call counts."""
        with self._lock:
            if self._preview_is_sampled:
                return
            self._preview_is_sampled, self.wants_preview = True, False
        self._notify(lambda observer: observer.preview_sampled(self, tokens))

    def publish_latent_preview(self, pixels: NDArray[np.uint8]) -> None:
        self._notify(lambda observer: observer.latent_preview_rendered(self, pixels))

    def publish_skipped_latent_preview(self, error: GlmImageError) -> None:
        self._notify(lambda observer: observer.latent_preview_skipped(self, error))

    def add_seconds(self, stage: Stage, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self._notify(lambda observer: observer.stage_finished(self, stage, seconds))

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Adds the duration of the block to a stage's time, even if it raises."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add_seconds(stage, time.monotonic() - started)

    def _notify(self, call: Callable[[RequestObserver], None]) -> None:
        for observer in self.observers:
            try:
                call(observer)
            except Exception:
                logger.exception("%s failed to observe request %s", type(observer).__name__, shown(self.id))


def _overrides(observer: RequestObserver, method: str) -> bool:
    return getattr(type(observer), method) is not getattr(RequestObserver, method)

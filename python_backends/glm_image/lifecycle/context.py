"""A request in flight: who it is, until when, whether anyone still wants it, and where its time went."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from glm_image.errors import CancelledError, DeadlineExceededError, shown

logger = logging.getLogger(__name__)

Told = TypeVar("Told")

NANOSECONDS = 1_000_000_000
LATEST_DEADLINE_NS = 2**63 - 1
"""What a deadline's INT64 tensor holds; a timeout of centuries comes to this."""


@dataclass(frozen=True)
class Timeouts:
    """How long requests may take, in microseconds; 0 = as long as they like.

    Attributes:
        default_us: of a request that does not say.
        max_us: of any request; one that asks for more, or for none, has this.
    """

    default_us: int = 0
    max_us: int = 0

    def of(self, asked_us: int) -> int:
        """Returns the timeout of a request that asks for ``asked_us``."""
        wanted = asked_us if asked_us > 0 else self.default_us
        return min(wanted or self.max_us, self.max_us) if self.max_us else wanted


@dataclass(frozen=True)
class Progress:
    """How far a stage of a request has come.

    Attributes:
        stage: ``prefill``, ``tokens`` or ``denoise``.
        done: prompts read, tokens drawn or steps taken, of all its pictures.
        total: how many there will be.
        sigma: the noise that is left in a picture being denoised, 1 to 0.
    """

    stage: str
    done: int
    total: int
    sigma: float | None = None


def not_begun() -> Progress:
    """How far a request is that nothing has been told of."""
    return Progress("", 0, 1)


def ignore_picture(pixels: NDArray[np.uint8]) -> None:
    """What is done with the pictures of what is being denoised where nobody looks."""


def ignore_stage_seconds(stage: str, seconds: float) -> None:
    """What is done with the parts of a stage's time where nobody traces."""


@dataclass(eq=False)
class RequestContext:
    """A request in flight, shared by the thread that serves it and whoever may cancel it.

    Attributes:
        id: the caller's request id, or one made here.
        deadline_ns: ``time.monotonic_ns()`` after which the request is worthless; 0 = none.
        arrived_ns: ``time.monotonic_ns()`` when the server took it; with the id, what tells requests apart.
        progress: says how far it is; may be asked from any thread.
        on_progress: called from the engine's thread; must return at once. None = nobody watches.
        seconds: wall-clock seconds per stage.
        on_seconds: called with each part of a stage's time when it is over; must return at once.
        on_preview: called once, as ``on_progress``, with the tokens of the first picture's preview, int32 [tokens], as
            soon as they are drawn; None = nobody wants them.
        pictures_every: steps between two calls of ``on_picture``; 0 = none.
        on_picture: called as ``on_progress``, with what the picture being denoised will be, uint8 [height, width, 3].
        cached_steps: denoising steps that the cache skipped, of each picture painted so far.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    deadline_ns: int = 0
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    progress: Callable[[], Progress] = not_begun
    on_progress: Callable[[Progress], None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    on_stage_seconds: Callable[[str, float], None] = ignore_stage_seconds
    on_preview: Callable[[NDArray[np.int32]], None] | None = None
    pictures_every: int = 0
    on_picture: Callable[[NDArray[np.uint8]], None] = ignore_picture
    cached_steps: list[int] = field(default_factory=list)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)
    _on_cancel: Callable[[], None] | None = field(default=None, repr=False)

    @classmethod
    def with_timeout(cls, request_id: str, timeout_us: int) -> RequestContext:
        """Makes a job from a KServe request: its id ("" = make one) and its timeout in microseconds (0 = none)."""
        now = time.monotonic_ns()
        deadline_ns = min(now + timeout_us * 1000, LATEST_DEADLINE_NS) if timeout_us > 0 else 0
        return cls(id=request_id or uuid.uuid4().hex, deadline_ns=deadline_ns, arrived_ns=now)

    @property
    def cancelled(self) -> bool:
        """Whether somebody has cancelled it."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Asks the engine to drop the request: at once while it waits, else at its next look."""
        self._cancelled.set()
        if self._on_cancel is not None:
            self._on_cancel()

    def on_cancel(self, call: Callable[[], None]) -> None:
        """Has ``call`` called by whoever cancels, in place of what was to be before; at once if it is too late."""
        self._on_cancel = call
        if self.cancelled:
            call()

    def check(self, needed_seconds: float = 0.0) -> None:
        """Looks whether the request is to go on.

        Args:
            needed_seconds: what is left of it takes at least this long.

        Raises:
            CancelledError: it was cancelled.
            DeadlineExceededError: its time has run out, or is too short for what is left.
        """
        if self.cancelled:
            raise CancelledError(f"request {shown(self.id)} was cancelled")
        if not self.deadline_ns:
            return
        left = (self.deadline_ns - time.monotonic_ns()) / NANOSECONDS
        if left < 0:
            raise DeadlineExceededError(f"request {shown(self.id)} is {-left:.3f} s past its deadline")
        if left < needed_seconds:
            raise DeadlineExceededError(
                f"request {shown(self.id)} cannot meet its deadline: what is left to do takes at least "
                f"{needed_seconds:.3f} s, and it has {left:.3f} s, {needed_seconds - left:.3f} s too little"
            )

    def report(self, stage: str, done: int, total: int, sigma: float | None = None) -> None:
        """Says how far it is; a sink that fails is no reason for the engine to stop."""
        now = Progress(stage, done, total, sigma)
        self.progress = lambda: now
        self.publish_progress()

    def publish_progress(self) -> None:
        """Tells who watches how far it is, if anybody does."""
        watcher = self.on_progress  # which another thread may take away
        if watcher is not None:
            self._tell(watcher, self.progress())

    def publish_preview(self, tokens: NDArray[np.int32]) -> None:
        """Gives a preview's tokens to who wants them, who then wants no more; a fault is as one of ``report``."""
        wanted, self.on_preview = self.on_preview, None
        if wanted is not None:
            self._tell(wanted, tokens)

    def show(self, pixels: NDArray[np.uint8]) -> None:
        """Shows what the picture being denoised will be; a fault is as one of ``report``."""
        self._tell(self.on_picture, pixels)

    def _tell(self, sink: Callable[[Told], None], told: Told) -> None:
        try:
            sink(told)
        except Exception:
            logger.exception("what is told of request %s cannot be published", self.id)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds to a stage's time."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.on_stage_seconds(stage, seconds)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to a stage's."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add_seconds(stage, time.monotonic() - started)

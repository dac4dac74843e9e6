"""A request in flight: who it is, until when, whether anyone still wants it, and where its time went."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from glm_image.errors import CancelledError, DeadlineExceededError

logger = logging.getLogger(__name__)

NANOSECONDS = 1_000_000_000
LATEST_DEADLINE_NS = 2**63 - 1
"""What a deadline's INT64 tensor holds; a timeout of centuries comes to this."""


@dataclass(frozen=True)
class Progress:
    """How far a stage of a request has come."""

    stage: str
    done: int
    total: int


def ignore_progress(progress: Progress) -> None:
    """The sink of a request nobody watches."""


@dataclass
class Job:
    """A request in flight, shared by the thread that serves it and whoever may cancel it.

    Attributes:
        id: the caller's request id, or one made here.
        deadline_ns: ``time.monotonic_ns()`` after which the request is worthless; 0 = none.
        on_progress: called from the engine's thread; must return at once.
        seconds: wall-clock seconds per stage.
        cached_steps: denoising steps that the cache skipped, of each picture painted so far.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    deadline_ns: int = 0
    on_progress: Callable[[Progress], None] = ignore_progress
    seconds: dict[str, float] = field(default_factory=dict)
    cached_steps: list[int] = field(default_factory=list)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)

    @classmethod
    def with_timeout(cls, request_id: str, timeout_us: int) -> Job:
        """Makes a job from a KServe request: its id ("" = make one) and its timeout in microseconds (0 = none)."""
        deadline_ns = min(time.monotonic_ns() + timeout_us * 1000, LATEST_DEADLINE_NS) if timeout_us > 0 else 0
        return cls(id=request_id or uuid.uuid4().hex, deadline_ns=deadline_ns)

    def cancel(self) -> None:
        """Asks the engine to drop the request at its next look."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises CancelledError or DeadlineExceededError when the request is not to go on."""
        if self._cancelled.is_set():
            raise CancelledError(f"request {self.id} was cancelled")
        late = time.monotonic_ns() - self.deadline_ns
        if self.deadline_ns and late > 0:
            raise DeadlineExceededError(f"request {self.id} is {late / NANOSECONDS:.3f} s past its deadline")

    def report(self, stage: str, done: int, total: int) -> None:
        """Publishes progress; a sink that fails is no reason for the engine to stop."""
        try:
            self.on_progress(Progress(stage, done, total))
        except Exception:
            logger.exception("the progress of request %s cannot be published", self.id)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds to a stage's time."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to a stage's."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add_seconds(stage, time.monotonic() - started)

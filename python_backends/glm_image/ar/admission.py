"""Admission of waiting sequences to free slots. Touches no tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from glm_image.lifecycle.dit_load import DitLoad

logger = logging.getLogger(__name__)

ADMISSIONS: Final = ("at_once", "gathered")

NEARLY_USED_UP = 1
"""Images left to the DiT that take it about as long as the AR takes to decode a batch."""
CHEAP = 0.25
"""The share of its own steps by which a sequence may lengthen the batch that it joins."""
PATIENCE = 1.5
"""Factor on expected times: they are means, and the two stages slow each other down."""


@dataclass(frozen=True)
class QueueSnapshot:
    """The queue and the slots at one moment. Times are in seconds, of one clock.

    Attributes:
        waiting: sequences without a slot, at least 1.
        free: slots without a sequence, at least 1.
        running: sequences in slots.
        extends: the share of its steps by which the first waiting sequence would lengthen the running batch; 1 if
            nothing runs.
        has_begun: whether another image of its request has been given a slot.
        latest: when its wait by ``Admission.max_wait`` ends.
        deadline: the earliest deadline of the waiting requests; inf without one.
        decode_seconds: the time that the first waiting sequence is expected to take in a slot.
    """

    now: float
    waiting: int
    free: int
    running: int
    extends: float
    has_begun: bool
    latest: float
    deadline: float
    decode_seconds: float


class Admission(Protocol):
    """A policy; called by the scheduler while it holds a lock, so it must not block."""

    def max_wait(self, running: int, decode_seconds: float) -> float:
        """Returns the seconds that a request may wait after it has become the first in the queue.

        Args:
            running: sequences in slots.
            decode_seconds: the time that each of its own is expected to take in a slot; 0 while unknown.
        """

    def wait(self, queue: QueueSnapshot) -> float:
        """Returns the seconds that the first in the queue has to wait, unless something changes; 0 admits it."""

    def when_changed(self, call: Callable[[], None]) -> None:
        """Sets the callback for changes of ``wait`` whose cause the scheduler cannot see."""


class ImmediateAdmission:
    """Admits every sequence as soon as a slot is free."""

    def max_wait(self, running: int, decode_seconds: float) -> float:
        return 0.0

    def wait(self, queue: QueueSnapshot) -> float:
        return 0.0

    def when_changed(self, call: Callable[[], None]) -> None: ...


class BatchAdmission:
    """Collects sequences into batches while the DiT, on the same device, has enough to denoise.

    A decode step takes the same time for one sequence as for all slots, and delays the DiT by it. So a sequence that
    arrives while the DiT is busy gains nothing by an early start, and costs the others a whole run of steps. Sequences
    are admitted when the DiT is nearly out of work, when they fill the batch, or when joining a running batch is cheap.
    Running sequences count as work of the DiT, as they soon will be.

    ``warn`` takes, once, a message and its arguments: the DiT has not reported in the expected time.
    """

    def __init__(self, dit_load: DitLoad, warn: Callable[..., None] = logger.warning) -> None:
        self._dit_load = dit_load
        self._warn = warn
        self._has_warned = False

    def max_wait(self, running: int, decode_seconds: float) -> float:
        """Returns the expected time until all images before it are denoised, times ``PATIENCE``; 0 while unknown."""
        return self._expected((self._dit_load.images() or 0) + running, decode_seconds)

    def when_changed(self, call: Callable[[], None]) -> None:
        self._dit_load.when_changed(call)

    def wait(self, queue: QueueSnapshot) -> float:
        ahead = self._dit_load.images()
        if ahead is None or not self._dit_load.seconds_per_image or self._may_go(queue, ahead):
            return 0.0
        if queue.latest <= queue.now:
            self._warn_once(ahead)
            return 0.0
        needed = self._expected(ahead + queue.running + queue.waiting, queue.decode_seconds)
        return max(0.0, min(queue.latest, queue.deadline - needed, self._dit_load.next_loss()) - queue.now)

    @staticmethod
    def _may_go(queue: QueueSnapshot, ahead: int) -> bool:
        return (
            queue.has_begun  # the request's other images are forwarded together with this one
            or ahead + queue.running <= NEARLY_USED_UP
            or (queue.running == 0 and queue.waiting >= queue.free)
            or queue.extends < CHEAP
        )

    def _expected(self, images: int, decode_seconds: float) -> float:
        seconds_per_image = self._dit_load.seconds_per_image
        return PATIENCE * (decode_seconds + images * seconds_per_image) if seconds_per_image else 0.0

    def _warn_once(self, ahead: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(
                "glm_dit has %d images to denoise and has not reported in the expected time that they are nearly done; "
                "requests that have waited this long are admitted immediately",
                ahead,
            )

"""When a sequence that waits is let into a free slot. Touches no tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from glm_image.lifecycle.downstream import DitLoad

logger = logging.getLogger(__name__)

ADMISSIONS: Final = ("at_once", "gathered")

NEARLY_USED_UP = 1
"""Pictures for the second stage, with which it is busy for about as long as a batch decodes."""
CHEAP = 0.25
"""The share of its own steps by which a sequence may lengthen the batch that it joins."""
PATIENCE = 1.5
"""How often the expected time may pass: what is expected is a mean, and the stages slow each other down."""


@dataclass(frozen=True)
class QueueSnapshot:
    """Who waits and who runs at a moment. Times are those of ``time.monotonic``.

    Attributes:
        now: the moment.
        waiting: sequences without a slot, at least 1.
        free: slots without a sequence, at least 1.
        running: sequences in slots.
        extends: by which share of its steps the first that waits would lengthen what runs; 1 where nothing runs.
        has_begun: whether other pictures of its request have had a slot.
        latest: when it will have waited as long as ``max_wait`` said.
        deadline: the earliest of those that wait; inf = none has one.
        decode_seconds: what the first is expected to take in its slot.
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
    """Decides; called by the scheduler with its lock held, so it returns at once."""

    def max_wait(self, running: int, decode_seconds: float) -> float:
        """Returns the seconds that a request may wait at the head of the line, from when it has come there.

        Args:
            running: sequences in slots.
            decode_seconds: what each of its own is expected to take in one; 0 while that is not known.
        """

    def wait(self, line: QueueSnapshot) -> float:
        """Returns the seconds that the first in line is to wait still, unless something changes; 0 = let it in."""

    def when_changed(self, call: Callable[[], None]) -> None:
        """Has ``call`` called when ``wait`` may say something else for a reason that the scheduler cannot see."""


class ImmediateAdmission:
    """Lets in whoever comes, as long as there is a slot."""

    def max_wait(self, running: int, decode_seconds: float) -> float:
        """Nobody waits."""
        return 0.0

    def wait(self, line: QueueSnapshot) -> float:
        """Nobody waits."""
        return 0.0

    def when_changed(self, call: Callable[[], None]) -> None:
        """Nothing changes."""


class BatchAdmission:
    """Lets sequences wait for each other while the second stage, on the same device, has enough to paint.

    A decode step takes the same time for one sequence as for all slots, and takes it from the second stage. So whoever
    comes while there is a backlog gains nothing by going first, and costs the others a whole run of steps. The line
    moves when the backlog is nearly used up, when the waiting fill the batch, or when joining one that runs costs
    little. What runs counts as backlog, as it soon will be.

    Args:
        backlog: of the second stage.
        warn: takes, once, that the second stage has not said what was expected; a message and its arguments.
    """

    def __init__(self, backlog: DitLoad, warn: Callable[..., None] = logger.warning) -> None:
        self._backlog = backlog
        self._warn = warn
        self._has_warned = False

    def max_wait(self, running: int, decode_seconds: float) -> float:
        """The time in which all that is before it is painted, with patience; 0 while that is not known."""
        return self._expected((self._backlog.pictures() or 0) + running, decode_seconds)

    def when_changed(self, call: Callable[[], None]) -> None:
        """A painter's word is a reason."""
        self._backlog.when_changed(call)

    def wait(self, line: QueueSnapshot) -> float:
        """See ``Admission``."""
        ahead = self._backlog.pictures()
        if ahead is None or not self._backlog.seconds_a_picture or self._may_go(line, ahead):
            return 0.0
        if line.latest <= line.now:
            self._warn_once(ahead)
            return 0.0
        needed = self._expected(ahead + line.running + line.waiting, line.decode_seconds)
        return max(0.0, min(line.latest, line.deadline - needed, self._backlog.next_loss()) - line.now)

    @staticmethod
    def _may_go(line: QueueSnapshot, ahead: int) -> bool:
        return (
            line.has_begun  # the request's other pictures are handed on with this one
            or ahead + line.running <= NEARLY_USED_UP
            or (line.running == 0 and line.waiting >= line.free)
            or line.extends < CHEAP
        )

    def _expected(self, pictures: int, decode_seconds: float) -> float:
        a_picture = self._backlog.seconds_a_picture
        return PATIENCE * (decode_seconds + pictures * a_picture) if a_picture else 0.0

    def _warn_once(self, ahead: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(
                "glm_dit has %d pictures to paint and has not said in the expected time that they are nearly done; "
                "requests that wait so long are let in at once",
                ahead,
            )

"""A member of a pool: a server that serves one stage, its health, and the calls that it has."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from glm_image_client.calls import control
from glm_image_client.errors import GlmImageClientError, UnreachableError
from glm_image_gateway.pools.connection import MemberAddress, MemberTransport
from glm_image_gateway.routing import REQUESTS_PER_INSTANCE, Outstanding, Work

logger = logging.getLogger(__name__)

CHECK_SECONDS: Final = 1.0
"""Between two questions whether a member is ready."""
ANSWER_SECONDS: Final = 3.0
"""For the answer to it. A busy host may take that long; a member that gives none twice in a row is not ready."""
MISSES: Final = 2
DESCRIBE_SECONDS: Final = 10.0
"""Between two questions for a member's checkpoint."""

T = TypeVar("T")


@dataclass(frozen=True)
class Description:
    """What a member serves: its checkpoint, the instances of its stage, and the images of each at the same time."""

    name: str = ""
    revision: str = ""
    fingerprint: str = ""
    instances: int = 1
    slots: int = 1

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Description:
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})

    def is_called(self, revision: str) -> bool:
        """Returns whether ``revision`` names its checkpoint."""
        return revision in {self.revision, self.fingerprint}


@dataclass(eq=False)
class Lease:
    """A place at a member for one call.

    Attributes:
        seconds: predicted.
    """

    member: Member
    work: Work
    seconds: float
    _task: asyncio.Future[Any] | None = field(default=None, init=False)
    _is_lost: bool = field(default=False, init=False)

    async def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Returns the result of a call to the member.

        Raises:
            UnreachableError: the member is lost.
        """
        self._task = task = asyncio.ensure_future(call)
        try:
            return await task
        except asyncio.CancelledError:
            if self._is_lost:
                address, seconds = self.member.place.address, self.member.lost_seconds
                raise UnreachableError(f"no server answers at {address}: no answer for {seconds:g} s") from None
            raise

    def lose(self) -> None:
        self._is_lost = True
        if self._task is not None:
            self._task.cancel()


class Member:
    """A server of one stage.

    Attributes:
        lost_seconds: without an answer for so long it counts as lost, and its calls are sent to others.
        is_ready: whether it answers and all its models are ready.
        paused_until: the time before which it is given no calls, since its queue was full.
        is_leaving: whether its address has gone; it is closed after its last call.
    """

    def __init__(self, place: MemberAddress, stage: str, transport: MemberTransport, lost_seconds: float) -> None:
        self.place, self.stage, self.transport = place, stage, transport
        self.lost_seconds = lost_seconds
        self.is_ready, self.is_leaving = False, False
        self.paused_until = 0.0
        self.description: Description | None = None
        self.outstanding = Outstanding(1, REQUESTS_PER_INSTANCE)
        self.leases: set[Lease] = set()
        self._described, self._answered, self._misses = -math.inf, time.monotonic(), 0

    def open(self, work: Work, seconds: float) -> Lease:
        """Returns a place for a call, which ``close_lease`` ends."""
        lease = Lease(self, work, seconds)
        self.leases.add(lease)
        self.outstanding.add(lease, seconds, work.images, time.monotonic())
        return lease

    def close_lease(self, lease: Lease) -> None:
        self.leases.discard(lease)
        self.outstanding.remove(lease, time.monotonic())

    async def check(self) -> None:
        """Asks whether the member is ready, and when it became so, or after a while, what it serves."""
        is_ready = await self.transport.ready(ANSWER_SECONDS)
        if is_ready and (not self.is_ready or time.monotonic() - self._described >= DESCRIBE_SECONDS):
            await self.describe()
            is_ready = self.description is not None
        has_answered = is_ready or await self.transport.live(ANSWER_SECONDS)
        now = time.monotonic()
        if has_answered:
            self._answered, self._misses = now, 0
        else:
            self._misses += 1
        if is_ready or has_answered or self._misses >= MISSES:
            self._set_ready(is_ready)
        if now - self._answered > self.lost_seconds:
            for lease in tuple(self.leases):
                lease.lose()

    def _set_ready(self, is_ready: bool) -> None:
        if is_ready != self.is_ready:
            logger.info("%s %s is %s", self.stage, self.place.address, "ready" if is_ready else "not ready")
        self.is_ready = is_ready

    async def describe(self) -> None:
        """Asks for the checkpoint of the member, and how many images it works on at the same time."""
        call = control("describe", "", ANSWER_SECONDS)
        with suppress(GlmImageClientError, KeyError, TypeError):
            stages = call.read(await self.transport.infer(call, ANSWER_SECONDS))["stages"]
            self.description = found = Description.read(stages[self.stage])
            per_instance = found.slots if self.stage == "glm_ar" else REQUESTS_PER_INSTANCE
            self.outstanding.instances = found.instances * found.slots
            self.outstanding.most = found.instances * per_instance
            self._described = time.monotonic()

    async def close(self) -> None:
        await self.transport.close()

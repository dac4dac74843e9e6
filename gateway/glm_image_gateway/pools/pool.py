"""The members of one stage: who they are, which of them gets a call, and what becomes of calls that fail."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from glm_image_client.errors import (
    BusyError,
    GlmImageClientError,
    RefusedError,
    RequestCancelled,
    RequestTimeout,
    ServerFailure,
    UnreachableError,
)
from glm_image_client.transport import Endpoint
from glm_image_gateway.errors import is_out_of_memory, is_queue_full, shown
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.pools.connection import MemberAddress, MemberTransport, TlsFiles, resolved
from glm_image_gateway.pools.member import CHECK_SECONDS, Lease, Member
from glm_image_gateway.routing import FIRST_SECONDS, Predictor, Work, choose_ar, choose_dit

logger = logging.getLogger(__name__)

RESOLVE_SECONDS: Final = 5.0
"""Between two look-ups of the members' names."""
BUSY_SECONDS: Final = 0.5
"""For which a member with a full queue is given no calls."""
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 2.0
"""Before a call that failed is sent again; each pause is twice the previous one."""

T = TypeVar("T")


class StaleTokensError(Exception):
    """No member has the checkpoint that made the tokens."""


@dataclass(frozen=True)
class Wanted:
    """Which members may serve a call.

    Attributes:
        revision: of the checkpoint, or its fingerprint; None = any.
        fingerprints: of the checkpoints that may serve it; None = any.
    """

    revision: str | None = None
    fingerprints: frozenset[str] | None = None

    def allows(self, member: Member) -> bool:
        found = member.description
        if found is None:
            return False
        return (self.revision is None or found.is_called(self.revision)) and (
            self.fingerprints is None or found.fingerprint in self.fingerprints
        )


@dataclass(eq=False)
class _Waiter:
    work: Work
    wanted: Wanted
    avoided: set[MemberAddress]
    place: asyncio.Future[Lease] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Pool:
    """The servers of one stage.

    Args:
        stage: ``glm_ar`` or ``glm_dit``.
        endpoints: of the members; a name stands for all its addresses.
        tls: files for grpcs.
        proxy: where calls are sent, with the member's address in a header; None = to the member.
        max_waiting: calls that may wait for a member.
        max_failures: times that a call may fail at members and be sent again.
        lost_seconds: without an answer for so long a member counts as lost.
    """

    def __init__(
        self,
        stage: str,
        endpoints: Sequence[Endpoint],
        metrics: Metrics,
        *,
        tls: TlsFiles,
        proxy: Endpoint | None,
        max_waiting: int,
        max_failures: int,
        lost_seconds: float,
    ) -> None:
        self.stage, self._endpoints, self._metrics = stage, endpoints, metrics
        self._tls, self._proxy = tls, proxy
        self._max_waiting, self._max_failures, self._lost_seconds = max_waiting, max_failures, lost_seconds
        self.predictor = Predictor(FIRST_SECONDS[stage])
        self._members: dict[MemberAddress, Member] = {}
        self._waiting: list[_Waiter] = []
        self._tasks: dict[object, asyncio.Task[None]] = {}
        metrics.watch_pool(stage, self)

    @property
    def members(self) -> list[Member]:
        """The members whose addresses are known, ready or not."""
        return [member for member in self._members.values() if not member.is_leaving]

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members if member.is_ready]

    def start(self) -> None:
        """Begins to look up the members and to ask whether they are ready."""
        self._tasks[self] = asyncio.ensure_future(self._look_up())

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self._members.values():
            await member.close()

    def queued_seconds(self) -> float:
        """Returns the predicted seconds of the calls that wait for a member."""
        return sum(self.predictor.seconds(waiter.work) for waiter in self._waiting)

    def outstanding_seconds(self) -> float:
        """Returns the predicted seconds of unfinished work that the members have."""
        now = time.monotonic()
        return sum(member.outstanding.load(now).seconds for member in self._members.values())

    def fingerprints(self) -> frozenset[str]:
        """Returns the fingerprints of the members' checkpoints."""
        return frozenset(member.description.fingerprint for member in self.ready if member.description is not None)

    def least_loaded(self) -> Member:
        """Returns the member that is ready and has the least work.

        Raises:
            UnreachableError: there is none.
        """
        now = time.monotonic()
        members = self.ready
        if not members:
            raise UnreachableError(f"no member of {self.stage} is ready; it has {len(self.members)}")
        return min(members, key=lambda member: member.outstanding.load(now).wait)

    async def call(
        self,
        work: Work,
        wanted: Wanted,
        deadline: float,
        send: Callable[[Member, float], Coroutine[Any, Any, T]],
    ) -> T:
        """Returns the result of a call to a member; one that fails there is sent to another.

        A full queue is no failure: the call is held until a member is free. So it may be sent often, but fails at
        members at most ``max_failures`` times. ``send`` takes the member and the seconds left.

        Raises:
            StaleTokensError: no member has the checkpoint whose fingerprint is wanted.
            RequestTimeout: no member was free by the deadline, a time of ``time.monotonic()``.
            GlmImageClientError: a member's answer that another one would give too, or the last failure.
        """
        failures, avoided = 0, set[MemberAddress]()
        while True:
            async with self._lease(work, wanted, deadline, avoided) as lease:
                member = lease.member
                try:
                    return await lease.run(send(member, max(0.001, deadline - time.monotonic())))
                except (RequestCancelled, RequestTimeout):
                    raise
                except RefusedError as error:
                    if not str(error).startswith("ar_metadata's fingerprint"):
                        raise
                    await member.describe()
                    failure: GlmImageClientError = error
                    reason = "checkpoint"
                except (ServerFailure, UnreachableError) as error:
                    failure, reason = error, _reason(error)
                    if is_out_of_memory(str(error)):
                        raise
            if reason == "busy":
                member.paused_until = time.monotonic() + BUSY_SECONDS
                asyncio.get_running_loop().call_later(BUSY_SECONDS, self._dispatch)
            else:
                failures += 1
                avoided.add(member.place)
                member.is_ready = member.is_ready and reason not in {"unreachable", "unavailable"}
            if failures > self._max_failures:
                raise failure
            logger.warning("%s %s: %s: %s", self.stage, member.place.address, reason, failure)
            self._metrics.retries.labels(self.stage, reason).inc()
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**failures)
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))

    @asynccontextmanager
    async def _lease(
        self, work: Work, wanted: Wanted, deadline: float, avoided: set[MemberAddress]
    ) -> AsyncIterator[Lease]:
        """Waits for a member with room, and yields a place there."""
        self._check(wanted)
        if len(self._waiting) >= self._max_waiting:
            raise BusyError(f"{len(self._waiting)} requests wait for {self.stage}, as many as --max-queue allows")
        waiter = _Waiter(work, wanted, avoided)
        self._waiting.append(waiter)
        self._dispatch()
        began, lease = time.monotonic(), None
        try:
            while lease is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    ready = f"{len(self.ready)} of {len(self.members)} members are ready"
                    raise RequestTimeout(
                        f"no member of {self.stage} was free within {time.monotonic() - began:.1f} s, the time left to "
                        f"the request; {ready}",
                        "DEADLINE_EXCEEDED",
                    )
                done, _ = await asyncio.wait({waiter.place}, timeout=min(left, CHECK_SECONDS))
                if done:
                    lease = waiter.place.result()
                else:
                    self._check(wanted)
            self._metrics.stage_seconds.labels(f"{self.stage}_pool_queue").observe(time.monotonic() - began)
            yield lease
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:
                lease = waiter.place.result()
                lease.member.close_lease(lease)
            self._dispatch()

    def _check(self, wanted: Wanted) -> None:
        """Refuses what no member serves, as far as they are known."""
        known = [member for member in self.members if member.description is not None]
        if not known or any(wanted.allows(member) for member in known):
            return
        revisions = sorted({member.description.revision for member in known if member.description is not None})
        if wanted.revision is not None and wanted.revision not in revisions:
            raise RefusedError(f"revision is {shown(wanted.revision)}; allowed: {', '.join(revisions)}")
        raise StaleTokensError

    def _dispatch(self) -> None:
        """Gives places to the calls that wait, in their order; one that no free member may serve delays no other."""
        for waiter in list(self._waiting):
            member = self._chosen(waiter)
            if member is not None:
                self._waiting.remove(waiter)
                waiter.place.set_result(member.open(waiter.work, self.predictor.seconds(waiter.work)))

    def _chosen(self, waiter: _Waiter) -> Member | None:
        now = time.monotonic()
        able = [member for member in self.ready if member.paused_until <= now and waiter.wanted.allows(member)]
        able = [member for member in able if member.place not in waiter.avoided] or able
        loads = [member.outstanding.load(now) for member in able]
        images = waiter.work.images
        if self.stage == "glm_ar":
            index = choose_ar(loads, images, self.predictor.seconds(waiter.work), random.randrange)
        else:
            index = choose_dit(loads, images, random.randrange)
        return None if index is None else able[index]

    async def _look_up(self) -> None:
        while True:
            found: dict[MemberAddress, None] = {}
            unknown = False
            for endpoint in self._endpoints:
                try:
                    found |= dict.fromkeys(await resolved(endpoint))
                except OSError as error:
                    unknown = True
                    logger.warning("%s %s is not known: %s", self.stage, endpoint.address, error)
            self._adopt(found, keep_others=unknown)
            await asyncio.sleep(RESOLVE_SECONDS)

    def _adopt(self, found: Iterable[MemberAddress], *, keep_others: bool) -> None:
        places = set(found)
        for place in places - set(self._members):
            transport = MemberTransport(place, self.stage, self._tls, self._proxy)
            member = self._members[place] = Member(place, self.stage, transport, self._lost_seconds)
            self._tasks[member] = asyncio.ensure_future(self._watch(member))
        for place, member in self._members.items():
            member.is_leaving = place not in places and (member.is_leaving or not keep_others)

    async def _watch(self, member: Member) -> None:
        """Checks a member until its address has gone and its last call has ended."""
        while not (member.is_leaving and not member.leases):
            try:
                await member.check()
            except GlmImageClientError as error:
                logger.warning("%s %s: %s", self.stage, member.place.address, error)
            self._dispatch()
            await asyncio.sleep(CHECK_SECONDS)
        del self._members[member.place]
        del self._tasks[member]
        await member.close()


def _reason(error: GlmImageClientError) -> str:
    """Returns why a call is sent again, as the metric has it."""
    if isinstance(error, UnreachableError):
        return "unreachable"
    if isinstance(error, BusyError):
        return "busy" if is_queue_full(str(error)) else "unavailable"
    return "failed"

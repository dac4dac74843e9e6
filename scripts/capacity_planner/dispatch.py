"""How gateways choose the member of a pool that gets a request: the gateway's own code, and others to compare with."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from glm_image_gateway.routing import REQUESTS_PER_INSTANCE, Outstanding, choose_ar, choose_dit

UNLIMITED: Final = 10**9

HOLDING: Final = ("gateway", "least-seconds")
POLICIES: Final = (*HOLDING, "two-by-seconds", "two-by-requests", "least-requests", "round-robin")
"""``gateway`` is what this project's gateway does: it keeps requests until members have room, and chooses the less
loaded of two by predicted seconds. ``least-seconds`` keeps requests likewise, and chooses the least loaded of all. The
others send each request immediately: to the less loaded of two by predicted seconds, by requests (Envoy's
LEAST_REQUEST), to the member with the fewest requests, to each in turn."""


@dataclass(eq=False)
class Member:
    """A card of a pool.

    Attributes:
        stage: the instance that it runs.
        host: the number of its host.
        is_up: whether requests are sent to it.
    """

    stage: Any
    host: int
    is_up: bool = True


class Place(Protocol):
    """What waits for a member."""

    def succeed(self, member: Any) -> Any:
        """Ends the wait with the member that was chosen."""


PlaceT_co = TypeVar("PlaceT_co", bound=Place, covariant=True)


class Clock(Protocol[PlaceT_co]):
    """Simulated time, or that of a host."""

    @property
    def now(self) -> float:
        """Seconds."""

    def event(self) -> PlaceT_co:
        """Returns something that can be waited for."""


@dataclass(eq=False)
class _Waiting:
    key: Hashable
    seconds: float
    place: Place


class Dispatcher(Generic[PlaceT_co]):
    """What one gateway knows of one pool: the requests that wait, and its own requests at each member.

    Args:
        members: of the pool; changes when members join.
        policy: one of ``POLICIES``.
        slots: of a member of the AR; 0 for the DiT.
        source: of random choices.
    """

    def __init__(
        self, clock: Clock[PlaceT_co], members: list[Member], policy: str, slots: int, source: random.Random
    ) -> None:
        self._clock, self._members, self._slots, self._source = clock, members, slots, source
        self._policy = policy
        self._most = (slots if slots > 0 else REQUESTS_PER_INSTANCE) if policy in HOLDING else UNLIMITED
        self._waiting: deque[_Waiting] = deque()
        self._outstanding: dict[Member, Outstanding] = {}
        self._turn = 0

    def place(self, key: Hashable, seconds: float) -> PlaceT_co:
        """Returns what ends when a member has been chosen for work of so many predicted seconds."""
        place = self._clock.event()
        self._waiting.append(_Waiting(key, seconds, place))
        self.dispatch()
        return place

    def release(self, member: Member, key: Hashable) -> None:
        """Ends the request of a member."""
        self._at(member).remove(key, self._clock.now)
        self.dispatch()

    def dispatch(self) -> None:
        """Sends requests that wait, in their order, while a member has room."""
        while self._waiting:
            waiting = self._waiting[0]
            members = [member for member in self._members if member.is_up]
            if not members or (chosen := self._choose(members, waiting.seconds)) is None:
                return
            self._waiting.popleft()
            self._at(chosen).add(waiting.key, waiting.seconds, 1, self._clock.now)
            waiting.place.succeed(chosen)

    def seconds(self) -> float:
        """Returns the predicted seconds of the requests that wait, and of the unfinished ones of the members."""
        now = self._clock.now
        return sum(waiting.seconds for waiting in self._waiting) + sum(
            outstanding.load(now).seconds for outstanding in self._outstanding.values()
        )

    def _at(self, member: Member) -> Outstanding:
        if member not in self._outstanding:
            # As the gateway has it: all sequences of a batch run together, a DiT works on one image.
            self._outstanding[member] = Outstanding(self._slots or 1, self._most)
        return self._outstanding[member]

    def _choose(self, members: list[Member], seconds: float) -> Member | None:
        if self._policy == "round-robin":
            self._turn += 1
            return members[self._turn % len(members)]
        if self._policy == "least-requests":
            return self._least(members)
        if self._policy == "two-by-requests":
            return self._least(self._two(members))
        # The gateway's functions look only at members with room, and asking all for their load takes long.
        rooms = [member for member in members if len(self._at(member)) < self._most]
        if self._slots and self._policy in HOLDING:
            loads = [self._at(member).load(self._clock.now) for member in rooms]
            index = choose_ar(loads, 1, seconds, self._source.randrange)
            return None if index is None else rooms[index]
        if self._policy == "least-seconds":
            return self._least(rooms, by_seconds=True) if rooms else None
        two = self._two(rooms)
        index = choose_dit([self._at(member).load(self._clock.now) for member in two], 1, self._source.randrange)
        return None if index is None else two[index]

    def _two(self, members: list[Member]) -> list[Member]:
        return self._source.sample(members, min(2, len(members)))

    def _least(self, members: list[Member], *, by_seconds: bool = False) -> Member:
        """Returns the least loaded member; of equal ones, any."""
        at = [self._at(member) for member in members]
        loads = [outstanding.load(self._clock.now).wait if by_seconds else len(outstanding) for outstanding in at]
        least = min(loads)
        return self._source.choice([member for member, load in zip(members, loads, strict=True) if load == least])

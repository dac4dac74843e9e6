"""Weighted fair queueing between API keys.

Triton serves requests in their order of arrival. So that one key's requests do not delay those of another, the gateway
passes on only a window of work, and chooses what is next by start-time fair queueing: each request has a start tag, the
later of the virtual time and the end of its key's previous request, where a request takes its predicted seconds over
its key's weight. The request with the smallest start tag is next.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from glm_image_gateway.errors import ApiError
from glm_image_gateway.keys import Caller
from glm_image_gateway.work import MinuteBudget

MIN_RUNNING: Final = 2
"""Requests that may run whatever their size: while the second stage works on one, the first works on the next."""


@dataclass(frozen=True)
class Window:
    """What Triton may have at the same time.

    Attributes:
        max_running: requests.
        seconds: predicted seconds of work, for more than ``MIN_RUNNING`` requests.
        max_waiting: requests that wait in the gateway.
    """

    max_running: int
    seconds: float
    max_waiting: int


class Ticket:
    """A request's place in the queue; ``release`` ends it in any case."""

    def __init__(self, queue: FairQueue, caller: Caller, seconds: float, order: int) -> None:
        self._queue = queue
        self.caller, self.seconds, self.order = caller, seconds, order
        self.start_tag = 0.0
        self.is_running = False
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Waits until the request may be sent."""
        await self.turn

    def release(self) -> None:
        self._queue.release(self)


class FairQueue:
    """Requests that wait for their turn, and those that run; without a window every request runs immediately."""

    def __init__(self, window: Window | None, budget: Callable[[float], MinuteBudget] = MinuteBudget) -> None:
        self._window, self._budget = window, budget
        self._waiting: list[Ticket] = []
        self._running: set[Ticket] = set()
        self._virtual_time = 0.0
        self._end_tags: dict[str, float] = {}
        self._budgets: dict[str, tuple[float, MinuteBudget]] = {}
        self._orders = itertools.count()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def expected_wait(self) -> float:
        """Returns the predicted seconds of all the work in the queue."""
        return sum(ticket.seconds for ticket in (*self._waiting, *self._running))

    def admit(self, caller: Caller, seconds: float, work: float, *, is_resumed: bool = False) -> Ticket:
        """Returns a request's place; one that is resumed after a restart was admitted before.

        Args:
            caller: whom it comes from.
            seconds: predicted seconds.
            work: megapixel-steps.
            is_resumed: whether limits do not count.

        Raises:
            ApiError: the queue is full, or a limit of the key is reached.
        """
        if not is_resumed:
            self._check(caller, work)
        ticket = Ticket(self, caller, seconds, next(self._orders))
        ticket.start_tag = max(self._virtual_time, self._end_tags.get(caller.name, 0.0))
        self._end_tags[caller.name] = ticket.start_tag + seconds / caller.weight
        self._waiting.append(ticket)
        self._start_next()
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Removes a request that has ended, or that no longer waits."""
        self._running.discard(ticket)
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            # Its key has not had this time.
            self._end_tags[ticket.caller.name] -= ticket.seconds / ticket.caller.weight
        if not self._waiting and not self._running:
            self._virtual_time = 0.0
            self._end_tags.clear()
        self._start_next()

    def _check(self, caller: Caller, work: float) -> None:
        mine = sum(ticket.caller.name == caller.name for ticket in (*self._waiting, *self._running))
        if caller.max_in_flight is not None and mine >= caller.max_in_flight:
            message = f"the API key has {mine} requests in flight; allowed: {caller.max_in_flight}"
            raise ApiError(429, message, "too_many_requests", retry_after=self._wait_of(caller))
        if self._window is not None and len(self._waiting) >= self._window.max_waiting and not self._may_start():
            message = f"{len(self._waiting)} requests wait in the gateway, as many as --max-queue allows"
            raise ApiError(429, message, "queue_full", retry_after=self.expected_wait())
        if caller.megapixel_steps_per_minute is not None:
            pause = self._budget_of(caller.name, caller.megapixel_steps_per_minute).take(work)
            if pause:
                allowed = f"{caller.megapixel_steps_per_minute:g} megapixel-steps a minute"
                message = f"the request has {work:.1f} megapixel-steps; allowed for the API key: {allowed}"
                raise ApiError(429, message, "rate_limit_exceeded", retry_after=pause)

    def _wait_of(self, caller: Caller) -> float:
        return min((ticket.seconds for ticket in self._running if ticket.caller.name == caller.name), default=1.0)

    def _budget_of(self, name: str, per_minute: float) -> MinuteBudget:
        limit, budget = self._budgets.get(name, (0.0, None))
        if budget is None or limit != per_minute:
            budget = self._budget(per_minute)
            self._budgets[name] = (per_minute, budget)
        return budget

    def _may_start(self) -> bool:
        if self._window is None or len(self._running) < min(MIN_RUNNING, self._window.max_running):
            return True
        has_room = sum(ticket.seconds for ticket in self._running) < self._window.seconds
        return len(self._running) < self._window.max_running and has_room

    def _start_next(self) -> None:
        while self._waiting and self._may_start():
            ticket = min(self._waiting, key=lambda waiting: (waiting.start_tag, waiting.order))
            self._waiting.remove(ticket)
            self._running.add(ticket)
            self._virtual_time = max(self._virtual_time, ticket.start_tag)
            if not ticket.turn.done():
                ticket.turn.set_result(None)

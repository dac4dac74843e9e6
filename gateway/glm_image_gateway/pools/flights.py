"""The requests that the pools have, by id: to cancel them and to report their state."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

from glm_image_client.calls import control
from glm_image_client.errors import GlmImageClientError, RequestCancelled
from glm_image_gateway.errors import shown
from glm_image_gateway.pools.member import Member

MAX_REMEMBERED: Final = 4096
MAX_PER_ID: Final = 16
CONTROL_SECONDS: Final = 2.0
STAGE_ORDER: Final = ("ar_queue", "prefill", "decode", "dit_queue", "condition", "denoise", "vae", "encode")
IN_FLIGHT: Final = ("running", "queued")

T = TypeVar("T")


class Flight:
    """A request that the pools have.

    Attributes:
        queue: the queue that it is in, or was in last: ``ar_queue`` or ``dit_queue``.
        members: that work on it; one that renders several parts is there several times.
        is_cancelled: whether it was cancelled by its id.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.began = time.monotonic()
        self.queue = "ar_queue"
        self.members: list[Member] = []
        self.is_cancelled = False
        self._task: asyncio.Future[Any] | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns the result of the request's work.

        Raises:
            RequestCancelled: it was cancelled by its id.
        """
        self._task = task = asyncio.ensure_future(work)
        try:
            return await task
        except asyncio.CancelledError:
            if self.is_cancelled:
                raise RequestCancelled(f"request {shown(self.request_id)} was cancelled", "CANCELLED") from None
            raise

    def cancel(self) -> bool:
        """Cancels the request; returns False if it has ended or been cancelled before."""
        if self.is_cancelled or self._task is None or self._task.done():
            return False
        self.is_cancelled = True
        self._task.cancel()
        return True

    async def status(self) -> dict[str, Any]:
        """Returns the state of the request: that of its members, where any works on it."""
        queued = {"state": "queued", "stage": self.queue, "done": 0, "total": 1}
        replies = await asked(dict.fromkeys(self.members), "status", self.request_id)
        found = [request for reply in replies for request in reply.get("requests", ()) if request["state"] in IN_FLIGHT]
        return {**(joined(found) if found else queued), "seconds": round(time.monotonic() - self.began, 3)}


def joined(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the state of a request whose parts have the given ones: their most advanced stage, and its progress."""
    running = [request for request in requests if request["state"] == "running"] or requests
    stage = max((str(request["stage"]) for request in running), key=position)
    same = [request for request in running if request["stage"] == stage]
    first = {name: same[0][name] for name in ("sigma",) if name in same[0]}
    return {
        "state": same[0]["state"],
        "stage": stage,
        "done": sum(request["done"] for request in same),
        "total": sum(request["total"] for request in same),
        **first,
    }


def position(stage: str) -> int:
    """Returns the place of a stage in the order of stages; -1 for one that is not known."""
    return STAGE_ORDER.index(stage) if stage in STAGE_ORDER else -1


async def asked(members: Mapping[Member, object], action: str, request_id: str) -> list[dict[str, Any]]:
    """Returns the replies of members to a call of ``glm_control``; those that do not reply are left out."""

    async def reply(member: Member) -> dict[str, Any] | None:
        call = control(action, request_id, CONTROL_SECONDS)
        try:
            return call.read(await member.transport.infer(call, CONTROL_SECONDS))
        except GlmImageClientError:
            return None

    return [found for found in await asyncio.gather(*map(reply, members)) if found is not None]


class Flights:
    """All requests of the pools, and for a while how those ended that have."""

    def __init__(self) -> None:
        self._flights: dict[str, list[Flight]] = {}
        self._ended: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()

    async def run(self, flight: Flight, work: Coroutine[Any, Any, T]) -> T:
        """Returns the result of a request's work, during which it is found by its id."""
        self._flights.setdefault(flight.request_id, []).append(flight)
        state = "failed"
        try:
            result = await flight.run(work)
            state = "finished"
        except (RequestCancelled, asyncio.CancelledError):
            state = "cancelled"
            raise
        finally:
            self._end(flight, state)
        return result

    def _end(self, flight: Flight, state: str) -> None:
        flights = self._flights[flight.request_id]
        flights.remove(flight)
        if not flights:
            del self._flights[flight.request_id]
        stage = "encode" if state == "finished" else flight.queue
        seconds = round(time.monotonic() - flight.began, 3)
        event = {"state": state, "stage": stage, "done": 1, "total": 1, "seconds": seconds}
        self._ended[flight.request_id] = [*self._ended.pop(flight.request_id, ()), event][-MAX_PER_ID:]
        if len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def knows(self, request_id: str) -> bool:
        return request_id in self._flights or request_id in self._ended

    async def cancel(self, request_id: str) -> dict[str, Any]:
        """Cancels the requests of an id that this gateway has; the reply is that of ``glm_control``."""
        flights = list(self._flights.get(request_id, ()))
        states = [await flight.status() for flight in flights]
        requests = [*self._ended.get(request_id, ()), *states]
        cancelled = sum(flight.cancel() for flight in flights)
        before = overall(requests)
        state = "cancelled" if cancelled else "already_cancelled" if before == "cancelled" else before
        return {
            "request_id": request_id,
            "action": "cancel",
            "state": state,
            "cancelled": cancelled,
            "requests": requests,
        }

    async def status(self, request_id: str) -> dict[str, Any]:
        """Returns the state of the requests of an id that this gateway has; the reply is that of ``glm_control``."""
        states = [await flight.status() for flight in self._flights.get(request_id, ())]
        requests = [*self._ended.get(request_id, ()), *states]
        return {"request_id": request_id, "action": "status", "state": overall(requests), "requests": requests}


def overall(requests: Sequence[Mapping[str, Any]]) -> str:
    """Returns the state of the requests of an id: of those in flight, else of the latest."""
    states = [str(request["state"]) for request in requests]
    in_flight = [state for state in IN_FLIGHT if state in states]
    return (in_flight or states[-1:] or ["unknown"])[0]


def together(action: str, request_id: str, replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one reply of ``glm_control`` for those of several servers."""
    requests = [request for reply in replies for request in reply.get("requests", ())]
    whole = {"request_id": request_id, "action": action, "state": overall(requests), "requests": requests}
    if action == "cancel":
        cancelled = sum(reply.get("cancelled", 0) for reply in replies)
        before = "already_cancelled" if whole["state"] == "cancelled" else whole["state"]
        whole |= {"state": "cancelled" if cancelled else before, "cancelled": cancelled}
    return whole

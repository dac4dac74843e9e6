"""How much the first stage has given the second to paint that is not painted yet, as both instances know it.

Nothing of an ensemble tells the first stage what becomes of its tokens. So each painting instance states, whenever that
changes, which requests it has and how many of their pictures are left. A statement says all of it: whoever missed one,
or asks later, knows as much after the next.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from glm_image.ipc.protocol import KEY_BYTES, Event, publish_nothing
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.eta import DurationStats

TOPIC = b"painting".ljust(KEY_BYTES)
"""Where statements are published: as long as the keys of requests, and none of them, as those are digests."""

HAND_OVER_SECONDS = 1.0
"""Longer than a request takes from one stage to an instance of the other that waits for it."""


class DitLoadReporter:
    """What a painting instance states.

    Args:
        name: of the instance.
    """

    def __init__(self, name: str) -> None:
        self.publish: Callable[[bytes, Callable[[], Event]], None] = publish_nothing
        self._name = name
        self._lock = threading.Lock()
        self._left: dict[int, tuple[int, int]] = {}
        self._pace = DurationStats()

    def begin(self, context: RequestContext, pictures: int) -> None:
        """Takes a request, and looks at its seconds from now on; ``end`` must be called whatever happens."""
        told = context.on_stage_seconds

        def note(stage: str, seconds: float) -> None:
            told(stage, seconds)
            if stage == "denoise":  # once a picture
                self._pace.add(seconds)
                with self._lock:
                    arrived_ns, left = self._left.get(id(context), (0, 0))
                    if left:
                        self._left[id(context)] = (arrived_ns, left - 1)
                self.tell()

        context.on_stage_seconds = note
        with self._lock:
            self._left[id(context)] = (context.arrived_ns, pictures)
        self.tell()

    def end(self, context: RequestContext) -> None:
        """Lets go of a request."""
        with self._lock:
            self._left.pop(id(context), None)
        self.tell()

    def tell(self) -> None:
        """States how it stands."""
        self.publish(TOPIC, self._statement)

    def _statement(self) -> Event:
        with self._lock:
            requests = list(self._left.values())
        return {"painter": self._name, "requests": requests, "seconds_a_picture": self._pace.mean}


@dataclass(frozen=True)
class _Painter:
    """The last statement of an instance: pictures left by the arrival of their requests, and since when it has none."""

    requests: list[tuple[int, int]]
    seconds_a_picture: float
    idle_since: float


@dataclass(frozen=True)
class _HandedOn:
    pictures: int
    at: float


class DitLoad:
    """What the first stage knows; requests are named by their arrival.

    Tokens may never be painted: the caller wanted no more, has gone away, or was refused by the queue in between. As
    that queue keeps the order, what was handed on well before a request that has come out is not in it any more; and
    while a painter has nothing to do, nothing waits there.

    Args:
        clock: tells the seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._handed_on: dict[int, _HandedOn] = {}
        self._painters: dict[str, _Painter] = {}
        self._on_change: Callable[[], None] = lambda: None

    def when_changed(self, call: Callable[[], None]) -> None:
        """Has ``call`` called after each statement, by the thread that heard it."""
        self._on_change = call

    def hand_on(self, arrived_ns: int, pictures: int) -> None:
        """Notes that tokens are on their way to the second stage; before they are."""
        with self._lock:
            self._handed_on[arrived_ns] = _HandedOn(pictures, self._clock())

    def hear(self, statement: Event) -> None:
        """Takes a painter's statement."""
        requests = [(arrived_ns, left) for arrived_ns, left in statement["requests"]]
        idle_since = math.inf if requests else self._clock()
        with self._lock:
            self._painters[statement["painter"]] = _Painter(requests, statement["seconds_a_picture"], idle_since)
            taken = [self._handed_on.pop(arrived_ns, None) for arrived_ns, _ in requests]
            # What decoded together is handed on at once, and may come out in any order.
            passed = max((one.at for one in taken if one), default=-math.inf) - HAND_OVER_SECONDS
            self._keep(lambda one: one.at >= passed)
        self._on_change()

    def pictures(self) -> int | None:
        """Returns how many are handed on and not denoised; None while no painter has said anything."""
        with self._lock:
            if not self._painters:
                return None
            now = self._clock()
            self._keep(lambda one: self._lost_at(one) > now)
            painting = sum(left for painter in self._painters.values() for _, left in painter.requests)
            return painting + sum(one.pictures for one in self._handed_on.values())

    def next_loss(self) -> float:
        """Returns when the next that was handed on will count as lost, if nothing is heard of it; inf = never."""
        with self._lock:
            return min(map(self._lost_at, self._handed_on.values()), default=math.inf)

    @property
    def seconds_a_picture(self) -> float:
        """What the painters together lately took for one; 0 while that is not known."""
        with self._lock:
            rates = [1 / told.seconds_a_picture for told in self._painters.values() if told.seconds_a_picture > 0]
        return 1 / sum(rates) if rates else 0.0

    def _lost_at(self, one: _HandedOn) -> float:
        idle_since = min((painter.idle_since for painter in self._painters.values()), default=math.inf)
        return max(one.at, idle_since) + HAND_OVER_SECONDS

    def _keep(self, is_there: Callable[[_HandedOn], bool]) -> None:
        self._handed_on = {arrived_ns: one for arrived_ns, one in self._handed_on.items() if is_there(one)}

"""The order in which requests use the DiT's device: deficit round robin over predicted seconds.

Images of different requests take turns, so a request of many images delays the others by one of its images at a time.
A policy of plain numbers: no clock, no thread, no tensor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping
from typing import Final, Generic, TypeVar

Flow = TypeVar("Flow", bound=Hashable)

QUANTUM_SECONDS: Final = 0.5
"""Less than most images take, so that requests advance nearly evenly; a round costs microseconds."""


class DeficitRoundRobin(Generic[Flow]):
    """Shares seconds of a device evenly among flows, each of which has images to denoise one after the other.

    Flows are visited in turn. A visit adds ``quantum`` seconds to what a flow may use; its next image runs when that
    covers the image's predicted seconds. What an image took is subtracted. Shreedhar and Varghese, "Efficient fair
    queueing using deficit round robin" (1995).

    While two flows always have an image to run, the seconds that they have had differ by at most two quanta and one
    image of each. A flow never waits while it is the only one that has an image to run.
    """

    def __init__(self, quantum: float = QUANTUM_SECONDS) -> None:
        self._quantum = quantum
        self._visited: Flow | None = None
        self._others: deque[Flow] = deque()
        self._credits: dict[Flow, float] = {}

    def add(self, flow: Flow) -> None:
        """Adds a flow, which is visited after all others."""
        self._credits[flow] = 0.0
        self._others.append(flow)

    def remove(self, flow: Flow) -> None:
        del self._credits[flow]
        if flow == self._visited:
            self._visited = None
        else:
            self._others.remove(flow)

    def next(self, costs: Mapping[Flow, float]) -> Flow | None:
        """Returns the flow whose image runs next; None if there is none.

        ``costs`` has the flows that have an image to run, and the seconds above 0 that it is predicted to take. The
        others are not visited.
        """
        if not costs:
            return None
        flow = self._visited
        if flow is None or not self._may_run(flow, costs):
            self._skip_rounds(costs)
            flow = self._visit_next(costs)
            while not self._may_run(flow, costs):
                flow = self._visit_next(costs)
        return flow

    def charge(self, flow: Flow, seconds: float) -> None:
        """Subtracts the seconds that an image of a flow took."""
        self._credits[flow] -= seconds

    def _may_run(self, flow: Flow, costs: Mapping[Flow, float]) -> bool:
        return flow in costs and self._credits[flow] >= costs[flow]

    def _visit_next(self, costs: Mapping[Flow, float]) -> Flow:
        if self._visited is not None:
            self._others.append(self._visited)
        self._visited = self._others.popleft()
        if self._visited in costs:
            self._credits[self._visited] += self._quantum
        return self._visited

    def _skip_rounds(self, costs: Mapping[Flow, float]) -> None:
        """Adds the quanta of all rounds in which no image would run, but for the last one of them."""
        missing = min((cost - self._credits[flow]) / self._quantum for flow, cost in costs.items())
        rounds = max(0, math.floor(missing) - 1)
        for flow in costs:
            self._credits[flow] += rounds * self._quantum

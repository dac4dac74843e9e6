"""Discrete-event simulation of pools: members on hosts, gateways, lost hosts, members added and removed by load."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from capacity_planner.dispatch import Dispatcher, Member
from capacity_planner.simulated_ar import ArInstance
from capacity_planner.simulated_ar import Sequence as ArSequence
from capacity_planner.simulated_device import Process, SimulatedDevice
from capacity_planner.simulated_dit import DitMember, Rendering


@dataclass(frozen=True)
class ImageCosts:
    """What an image costs both stages: its tokens, and seconds of an idle device."""

    tokens: int
    prefill: float
    rendering: Rendering
    added_step: float = 0.0
    decode: float = 0.0
    """In a slot, as the gateway predicts it."""


@dataclass(frozen=True)
class Scaling:
    """Adds and removes members by the predicted seconds of unfinished work, as an autoscaler of Kubernetes does.

    Attributes:
        seconds_per_member: of unfinished work that a member may have.
        lag: seconds from the decision until a new member is ready.
        most: members.
        interval: seconds between two decisions.
        calm: seconds of less work after which members are removed.
    """

    seconds_per_member: float
    lag: float
    most: int
    interval: float = 15.0
    calm: float = 300.0


@dataclass(frozen=True)
class HostLoss:
    """A host that is cut off at a time, and is back, empty, after ``seconds``."""

    at: float
    host: int
    seconds: float


@dataclass(frozen=True)
class Fleet:
    """Pools, one member a card.

    Attributes:
        step: seconds of a decode step, by the number of running sequences.
        policy: one of ``dispatch.POLICIES``.
        gateways: that share the requests evenly and know only of their own.
        cores: if given, all members share a device that runs so many tasks at full speed.
        detect_seconds: after which a gateway gives up the requests of a lost host (``LOST_SECONDS`` of its pools).
        overhead: seconds of a request outside both stages.
    """

    ar: int
    dit: int
    step: Callable[[int], float]
    slots: int = 8
    policy: str = "gateway"
    gateways: int = 1
    cores: float | None = None
    cards_per_host: int = 8
    detect_seconds: float = 10.0
    overhead: float = 0.0
    losses: Sequence[HostLoss] = ()
    scaling: Scaling | None = None

    def hosts(self) -> tuple[list[int], list[int]]:
        """Returns the host of each member of the AR, which are spread over the hosts, and of each of the DiT."""
        count = math.ceil((self.ar + self.dit) / self.cards_per_host)
        ar = [index * count // self.ar for index in range(self.ar)]
        free = [host for host in range(count) for _ in range(self.cards_per_host - ar.count(host))]
        return ar, free[: self.dit]


@dataclass
class FleetOutcome:
    """Times of every request in seconds, in order of arrival, and the members of the DiT whenever they change."""

    arrived: list[float]
    decoded: list[float]
    answered: list[float]
    retries: list[int]
    members: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def empty(cls, requests: int) -> FleetOutcome:
        unknown = [math.nan] * requests
        return cls([*unknown], [*unknown], [*unknown], [0] * requests)

    @property
    def latencies(self) -> list[float]:
        return [end - begin for begin, end in zip(self.arrived, self.answered, strict=True)]

    def throughput(self, skip: float = 0.0) -> float:
        """Returns the images a second between two shares of the answers: ``skip`` of them at either end are left out.

        At the start of a closed loop the DiT waits for its first tokens; at its end members run out of requests.
        """
        ends = sorted(self.answered)
        first, last = int(len(ends) * skip), len(ends) - 1 - int(len(ends) * skip)
        begin = ends[first] if skip else min(self.arrived)
        return (last - first + (not skip)) / (ends[last] - begin)


class MemberLostError(Exception):
    """The member that had a request is gone."""


class _Pool:
    """The members of a stage, and what each gateway knows of them."""

    def __init__(self, clock: simpy.Environment, hosts: Iterable[int], make: Callable[[], Any]) -> None:
        self._clock, self._make = clock, make
        self.members = [Member(make(), host) for host in hosts]
        self.dispatchers: list[Dispatcher[simpy.Event]] = []

    def lose(self, host: int, detect_seconds: float) -> Process:
        lost = [member for member in self.members if member.host == host]
        for member in lost:
            member.stage.stop()
        yield self._clock.timeout(detect_seconds)
        for member in lost:
            member.is_up = False
            member.stage.fail(MemberLostError())

    def restore(self, host: int) -> None:
        for member in self.members:
            if member.host == host:
                member.stage, member.is_up = self._make(), True
        self.dispatch()

    def add(self, host: int) -> None:
        self.members.append(Member(self._make(), host))
        self.dispatch()

    def dispatch(self) -> None:
        for dispatcher in self.dispatchers:
            dispatcher.dispatch()

    def seconds(self) -> float:
        return sum(dispatcher.seconds() for dispatcher in self.dispatchers)


class _SimulatedFleet:
    def __init__(self, fleet: Fleet, costs: Sequence[ImageCosts], seed: int) -> None:
        self.clock = simpy.Environment()
        self._fleet, self._costs = fleet, costs
        shared = None if fleet.cores is None else SimulatedDevice(self.clock, fleet.cores)
        ar_hosts, dit_hosts = fleet.hosts()

        def device() -> SimulatedDevice:
            return shared or SimulatedDevice(self.clock, 1.0)

        def ar_instance() -> ArInstance:
            return ArInstance(self.clock, device(), slots=fleet.slots, admission="at_once", step=fleet.step)

        self._ar = _Pool(self.clock, ar_hosts, ar_instance)
        self._dit = _Pool(self.clock, dit_hosts, lambda: DitMember(self.clock, device()))
        source = random.Random(f"routing {seed}")
        for pool, slots in ((self._ar, fleet.slots), (self._dit, 0)):
            pool.dispatchers = [
                Dispatcher(self.clock, pool.members, fleet.policy, slots, source) for _ in range(fleet.gateways)
            ]
        self.outcome = FleetOutcome.empty(len(costs))
        self.outcome.members.append((0.0, fleet.dit))
        for loss in fleet.losses:
            self.clock.process(self._lose(loss))
        if fleet.scaling is not None:
            self.clock.process(self._scale(fleet.scaling))

    def arrive(self, arrivals: Sequence[float]) -> Process:
        for index, arrival in enumerate(arrivals):
            yield self.clock.timeout(arrival - self.clock.now)
            self.clock.process(self._serve(index))

    def repeat(self, waiting: Iterable[int]) -> Process:
        """Starts a request whenever the previous one is answered (closed loop)."""
        for index in waiting:
            yield self.clock.process(self._serve(index))

    def _serve(self, index: int) -> Process:
        costs, outcome, gateway = self._costs[index], self.outcome, index % self._fleet.gateways
        outcome.arrived[index] = self.clock.now
        yield self.clock.timeout(self._fleet.overhead)
        sequence = ArSequence(index, costs.tokens, costs.prefill, costs.added_step)
        ar, dit = self._ar.dispatchers[gateway], self._dit.dispatchers[gateway]
        yield from self._call(ar, index, costs.decode, lambda stage: stage.decode(sequence))
        outcome.decoded[index] = self.clock.now
        yield from self._call(dit, index, costs.rendering.device_seconds, lambda stage: stage.render(costs.rendering))
        outcome.answered[index] = self.clock.now

    def _call(
        self, dispatcher: Dispatcher[simpy.Event], index: int, seconds: float, send: Callable[[Any], simpy.Event]
    ) -> Generator[simpy.Event, Any, None]:
        """Sends a request to members until one answers."""
        while True:
            member = yield dispatcher.place(index, seconds)
            try:
                yield send(member.stage)
            except MemberLostError:
                self.outcome.retries[index] += 1
            else:
                return
            finally:
                dispatcher.release(member, index)

    def _lose(self, loss: HostLoss) -> Process:
        yield self.clock.timeout(loss.at)
        for pool in (self._ar, self._dit):
            self.clock.process(pool.lose(loss.host, self._fleet.detect_seconds))
        yield self.clock.timeout(max(loss.seconds, self._fleet.detect_seconds) + 1e-3)
        for pool in (self._ar, self._dit):
            pool.restore(loss.host)

    def _scale(self, scaling: Scaling) -> Process:
        """Adds and removes members of the DiT until all requests are answered."""
        calm_since = math.inf
        ends: list[float] = []
        while any(map(math.isnan, self.outcome.answered)):
            yield self.clock.timeout(scaling.interval)
            ends = [end for end in ends if end > self.clock.now]
            up = sum(member.is_up for member in self._dit.members)
            wanted = min(scaling.most, math.ceil(self._dit.seconds() / scaling.seconds_per_member))
            if wanted < up:
                calm_since = min(calm_since, self.clock.now)
                if self.clock.now - calm_since >= scaling.calm:
                    self._drain(up - max(1, wanted))
                    calm_since = math.inf
                continue
            calm_since = math.inf
            for _ in range(wanted - up - len(ends)):
                ends.append(self.clock.now + scaling.lag)
                self.clock.process(self._start_member(scaling.lag))

    def _start_member(self, lag: float) -> Process:
        yield self.clock.timeout(lag)
        self._dit.add(len(self._dit.members) // self._fleet.cards_per_host)
        self._note_members()

    def _drain(self, count: int) -> None:
        """Sends no more requests to members; those that they have are answered."""
        for member in [member for member in self._dit.members if member.is_up][-count:]:
            member.is_up = False
        self._note_members()

    def _note_members(self) -> None:
        self.outcome.members.append((self.clock.now, sum(member.is_up for member in self._dit.members)))


def simulate_fleet(fleet: Fleet, costs: Sequence[ImageCosts], arrivals: Sequence[float], seed: int = 0) -> FleetOutcome:
    """Simulates requests that arrive at given times, ascending, each with costs of its own (open loop)."""
    simulated = _SimulatedFleet(fleet, costs, seed)
    simulated.clock.process(simulated.arrive(arrivals))
    simulated.clock.run()
    return simulated.outcome


def saturate_fleet(fleet: Fleet, costs: Sequence[ImageCosts], in_flight: int, seed: int = 0) -> FleetOutcome:
    """Simulates a closed loop: ``in_flight`` callers that each send a request when the previous one is answered."""
    simulated = _SimulatedFleet(fleet, costs, seed)
    waiting = iter(range(len(costs)))
    for _ in range(in_flight):
        simulated.clock.process(simulated.repeat(waiting))
    simulated.clock.run()
    return simulated.outcome

"""What fleets of many cards give: the best division into pools, latency, a lost host, routing, added members."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from capacity_planner.dispatch import POLICIES
from capacity_planner.mixes import Mix, ar_seconds, drawn, image_costs
from capacity_planner.pool_simulation import (
    Fleet,
    HostLoss,
    ImageCosts,
    Scaling,
    saturate_fleet,
    simulate_fleet,
)
from capacity_planner.simulation import percentile, poisson_arrivals
from capacity_planner.times import StageTimes

ENDS: Final = 0.2
"""Share of the answers at either end of a closed loop that do not count."""

MARGINS: Final = (0.0, 0.03, 0.08)
"""Members of the AR beyond the division by seconds alone that are tried: batches are not always full."""

WARM_UP: Final = 0.15
"""Share of the requests whose latency does not count, because they find an empty fleet."""


FEW_CARDS: Final = 100

SCALE_AT: Final = 0.75
"""Images' worth of unfinished seconds that a member of the DiT may have before another one is added."""


@dataclass(frozen=True)
class Trial:
    """How much is simulated.

    Attributes:
        load: share of the highest throughput at which latencies are simulated.
        requests_per_card: of a simulation.
        gateways: that share the requests.
    """

    load: float = 0.8
    requests_per_card: int = 10
    gateways: int = 1
    seed: int = 0

    def requests(self, cards: int) -> int:
        """Returns the requests of a simulation: few cards need more of them, for percentiles that mean something."""
        return self.requests_per_card * (cards + FEW_CARDS)


@dataclass(frozen=True)
class PoolsEstimate:
    """Pools of cards; latencies in seconds at ``rate`` images a second."""

    cards: int
    ar: int
    dit: int
    images_per_second: float
    rate: float
    p50: float
    p99: float

    @property
    def dit_per_ar(self) -> float:
        return self.dit / self.ar


@dataclass(frozen=True)
class LostHost:
    """What a host costs that is cut off for ``seconds``, at the estimate's rate.

    Attributes:
        images_per_second: the highest throughput of what is left, by the seconds of the stages.
        retried: requests that had to be sent again.
        p99: of the requests in flight or arriving while the host is away, in seconds.
    """

    cards: int
    seconds: float
    images_per_second: float
    retried: int
    p99: float


@dataclass(frozen=True)
class RoutingEstimate:
    """A policy: the throughput with all members in use, and latencies at the same rate for all policies."""

    policy: str
    images_per_second: float
    p50: float
    p99: float
    p99_of_small: float


@dataclass(frozen=True)
class ScalingEstimate:
    """Twice the requests from one moment on: latency until the end, and when the last member was added."""

    lag: float
    p50: float
    p99: float
    members: int
    seconds_to_last: float


def best_pools(cards: int, mix: Mix, times: StageTimes, trial: Trial) -> tuple[Fleet, float]:
    """Returns the division of cards with the highest simulated throughput, and that in images a second."""
    costs = drawn(mix, times, trial.requests(cards), trial.seed)
    found = []
    for ar in _divisions(cards, mix, times):
        fleet = Fleet(ar, cards - ar, times.step, times.full, gateways=trial.gateways, overhead=times.overhead)
        found.append((_most(fleet, costs, trial), -ar, fleet))
    most, _, fleet = max(found, key=lambda entry: entry[:2])
    return fleet, most


def _divisions(cards: int, mix: Mix, times: StageTimes) -> list[int]:
    ar, dit = _stage_seconds(mix, times)
    balanced = cards * ar / (ar + dit)
    tried = {math.floor(balanced), *(math.ceil(balanced * (1 + margin)) for margin in MARGINS)}
    return sorted({min(max(1, count), cards - 1) for count in tried})


def _stage_seconds(mix: Mix, times: StageTimes) -> tuple[float, float]:
    """Returns the mean seconds of an image in each stage."""
    shares = [(share, image_costs(kind, times)) for kind, share in mix.items()]
    ar = sum(share * ar_seconds(costs, times) for share, costs in shares)
    return ar, sum(share * costs.rendering.device_seconds for share, costs in shares)


def _most(fleet: Fleet, costs: Sequence[ImageCosts], trial: Trial) -> float:
    in_flight = fleet.slots * fleet.ar + 2 * fleet.dit
    return saturate_fleet(fleet, costs, in_flight, trial.seed).throughput(ENDS)


def pools_estimate(fleet: Fleet, most: float, mix: Mix, times: StageTimes, trial: Trial) -> PoolsEstimate:
    cards = fleet.ar + fleet.dit
    requests, rate = trial.requests(cards), trial.load * most
    costs = drawn(mix, times, requests, trial.seed)
    outcome = simulate_fleet(fleet, costs, poisson_arrivals(rate, requests, trial.seed), trial.seed)
    counted = outcome.latencies[int(requests * WARM_UP) :]
    return PoolsEstimate(cards, fleet.ar, fleet.dit, most, rate, percentile(counted, 50), percentile(counted, 99))


def lost_host(
    estimate: PoolsEstimate, fleet: Fleet, mix: Mix, times: StageTimes, seconds: float, trial: Trial
) -> LostHost:
    """Cuts off the first host, which has a member of the AR, while requests arrive at the estimate's rate."""
    begin = 4 * estimate.p50
    requests = math.ceil(estimate.rate * (begin + seconds + estimate.p50))
    costs = drawn(mix, times, requests, trial.seed)
    arrivals = poisson_arrivals(estimate.rate, requests, trial.seed)
    outcome = simulate_fleet(replace(fleet, losses=(HostLoss(begin, 0, seconds),)), costs, arrivals, trial.seed)
    hit = [
        answered - arrived
        for arrived, answered in zip(outcome.arrived, outcome.answered, strict=True)
        if arrived < begin + seconds and answered > begin
    ]
    return LostHost(
        cards=min(fleet.cards_per_host, fleet.ar + fleet.dit),
        seconds=seconds,
        images_per_second=min(estimate.images_per_second, _bound_without(fleet, 0, mix, times)),
        retried=sum(retries > 0 for retries in outcome.retries),
        p99=percentile(hit, 99),
    )


def _bound_without(fleet: Fleet, host: int, mix: Mix, times: StageTimes) -> float:
    """Returns the images a second that the other hosts' members can give."""
    left = (sum(place != host for place in places) for places in fleet.hosts())
    return min(members / seconds for members, seconds in zip(left, _stage_seconds(mix, times), strict=True))


def compare_routing(
    fleet: Fleet, mix: Mix, times: StageTimes, trial: Trial, policies: Sequence[str] = POLICIES
) -> Iterator[RoutingEstimate]:
    """Yields policies at the same rate: ``trial.load`` of what the seconds of the stages allow."""
    cards = fleet.ar + fleet.dit
    requests = trial.requests(cards)
    costs = drawn(mix, times, requests, trial.seed)
    small = min(cost.rendering.device_seconds for cost in costs)
    rate = trial.load * _bound_without(fleet, -1, mix, times)
    arrivals = poisson_arrivals(rate, requests, trial.seed)
    for policy in policies:
        routed = replace(fleet, policy=policy)
        latencies = simulate_fleet(routed, costs, arrivals, trial.seed).latencies
        counted = list(zip(latencies, costs, strict=True))[int(requests * WARM_UP) :]
        whole = [seconds for seconds, _ in counted]
        of_small = [seconds for seconds, cost in counted if cost.rendering.device_seconds == small]
        yield RoutingEstimate(
            policy,
            _most(routed, costs, trial),
            percentile(whole, 50),
            percentile(whole, 99),
            percentile(of_small, 99),
        )


def added_members(
    fleet: Fleet, most: float, mix: Mix, times: StageTimes, trial: Trial, lags: Sequence[float]
) -> Iterator[ScalingEstimate]:
    """Yields for each lag a fleet that begins with half of its DiT members and of its load, which then doubles."""
    rate, (_, dit) = trial.load * most, _stage_seconds(mix, times)
    step_at = 20 * dit
    before, after = math.ceil(rate / 2 * step_at), math.ceil(rate * (step_at + 2 * max(lags)))
    costs = drawn(mix, times, before + after, trial.seed)
    first = [arrival for arrival in poisson_arrivals(rate / 2, before, trial.seed) if arrival < step_at]
    arrivals = [*first, *(step_at + arrival for arrival in poisson_arrivals(rate, after, trial.seed + 1))]
    for lag in lags:
        scaling = Scaling(seconds_per_member=SCALE_AT * dit, lag=lag, most=fleet.dit)
        half = replace(fleet, dit=math.ceil(fleet.dit / 2), scaling=scaling)
        outcome = simulate_fleet(half, costs[: len(arrivals)], arrivals, trial.seed)
        latencies = outcome.latencies[len(first) :]
        members = max(count for _, count in outcome.members)
        last = max((at for at, count in outcome.members if count == members), default=step_at)
        yield ScalingEstimate(lag, percentile(latencies, 50), percentile(latencies, 99), members, last - step_at)

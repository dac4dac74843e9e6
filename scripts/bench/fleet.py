#!/usr/bin/env python3
"""Measures pools on this machine, each member a server of its own, against the simulation of `scripts/plan fleet`.

    scripts/bench/fleet.py [--dit 2] [--kinds 256x256/4,512x512/20] [--policies gateway,round-robin] [--load 0.7]

One server has glm_ar, each of ``--dit`` others glm_dit, all on the CPU with one thread. Requests go from this process
to glm_ar, then to the member of the DiT that a policy chooses, by the code that the simulation runs too. Prints JSON
lines:

``times``: seconds of each kind of request alone. ``most_a_second``: images a second with all members in use; it gives
the number of cores that the members get (``cores``), which the simulation shares out. For each policy: ``host``, the
cores that other programs used meanwhile, and ``predicted`` and ``measured`` of requests at random times. ``from`` says
what is simulated: the times of requests alone (``alone``), or the stage seconds that the run itself had (``run``). On a
host with other load, stage seconds vary from run to run, and only the latter says how good the simulation is.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from deploy import repository_with
from measure import PROMPT, new_parser, parse, report, size_name
from plan import busy_seconds
from served import DRAIN_SECONDS, checkpoint_of, percentile

from capacity_planner.dispatch import POLICIES, Dispatcher, Member
from capacity_planner.mixes import SMALL_SHARE
from capacity_planner.pool_simulation import Fleet, FleetOutcome, ImageCosts, saturate_fleet, simulate_fleet
from capacity_planner.simulated_dit import Rendering
from capacity_planner.simulation import poisson_arrivals
from capacity_planner.times import image_tokens, read_size
from glm_image.request.geometry import Size
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image_client import AsyncGlmImageClient

SLOTS = 8
HALVINGS = 12
"""Of the interval in which ``cores`` is searched."""
RENDERING = ("condition", "denoise", "vae")
"""On the CPU, one thread does all of them."""
WITHIN = 0.15

BRIEF = {"kinds": "64x64/2,128x128/4", "alone": 2, "busy": 8, "requests": 8, "dit": 1}


class Kind(NamedTuple):
    """Requests of one size and number of denoising steps."""

    size: Size
    steps: int


def read_kinds(text: str) -> list[Kind]:
    kinds = [part.partition("/") for part in text.split(",")]
    return [Kind(read_size(size), int(steps)) for size, _, steps in kinds]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser("fleet.py", __doc__)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--dit", type=int, default=2, metavar="N", help="members of the DiT (%(default)s)")
    parser.add_argument("--kinds", type=read_kinds, default="256x256/4,512x512/20", metavar="WxH/STEPS,WxH/STEPS")
    parser.add_argument("--share", type=float, default=SMALL_SHARE, help="of the first kind (%(default)s)")
    parser.add_argument("--policies", default="gateway,round-robin", help=f"of {', '.join(POLICIES)} (%(default)s)")
    parser.add_argument("--load", type=float, default=0.7, help="of the images a second with all in use (%(default)s)")
    parser.add_argument("--alone", type=int, default=4, help="requests of each kind, one at a time (%(default)s)")
    parser.add_argument("--busy", type=int, default=40, help="requests that keep all in use (%(default)s)")
    parser.add_argument("--requests", type=int, default=60, help="at random times, for each policy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parse(parser, arguments, BRIEF)


@dataclass(frozen=True)
class Answer:
    """A request: when it was due and answered, and the seconds of its stages."""

    kind: Kind
    due: float
    answered: float
    seconds: dict[str, float]

    @property
    def latency(self) -> float:
        return self.answered - self.due


class WallClock:
    """The clock of a ``Dispatcher`` outside of a simulation."""

    @property
    def now(self) -> float:
        return time.monotonic()

    def event(self) -> Place:
        return Place()


class Place:
    """A place at a member, when there is one."""

    def __init__(self) -> None:
        self.chosen: asyncio.Future[Member] = asyncio.get_running_loop().create_future()

    def succeed(self, member: Member) -> None:
        self.chosen.set_result(member)


class Pools:
    """The members as clients see them; ``stage`` of a member is its client."""

    def __init__(self, ar: AsyncGlmImageClient, dit: Sequence[AsyncGlmImageClient], seconds: dict[Kind, float]) -> None:
        self._ar, self._seconds = ar, seconds
        self._members = [Member(client, index) for index, client in enumerate(dit)]
        self.use("gateway")

    def use(self, policy: str) -> None:
        self._dispatcher = Dispatcher(WallClock(), self._members, policy, 0, random.Random(policy))

    async def answer(self, kind: Kind, seed: int, due: float | None = None) -> Answer:
        began = time.monotonic() if due is None else due
        size = {"height": kind.size.height, "width": kind.size.width}
        prior = await self._ar.prior_tokens(PROMPT, seed=seed, **size)
        member = await self._dispatcher.place(seed, self._seconds.get(kind, 1.0)).chosen
        try:
            result = await member.stage.paint(PROMPT, prior, seed=seed, num_inference_steps=kind.steps)
        finally:
            self._dispatcher.release(member, seed)
        return Answer(kind, began, time.monotonic(), dict(result.metadata.raw["seconds"]))

    async def decode_seconds(self, kind: Kind, images: int) -> float:
        """Returns the seconds of one request to the AR."""
        began = time.monotonic()
        size = {"height": kind.size.height, "width": kind.size.width}
        await self._ar.prior_tokens(PROMPT, seed=0, num_images=images, **size)
        return time.monotonic() - began

    async def keep_busy(self, kinds: Sequence[Kind], in_flight: int) -> list[Answer]:
        waiting = iter(enumerate(kinds))

        async def send() -> list[Answer]:
            return [await self.answer(kind, seed) for seed, kind in waiting]

        answers = await asyncio.gather(*(send() for _ in range(in_flight)))
        return [answer for some in answers for answer in some]

    async def send_at(self, kinds: Sequence[Kind], arrivals: Sequence[float]) -> list[Answer]:
        start = time.monotonic()

        async def send(seed: int) -> Answer:
            due = start + arrivals[seed]
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            return await self.answer(kinds[seed], seed, due)

        return await asyncio.gather(*(send(seed) for seed in range(len(kinds))))


@dataclass(frozen=True)
class AloneTimes:
    """Medians of requests sent one at a time, in seconds."""

    costs: dict[Kind, ImageCosts]
    step: float
    full_step: float
    overhead: float

    def fleet(self, dit: int) -> Fleet:
        return Fleet(1, dit, self.step_of, SLOTS, overhead=self.overhead)

    def step_of(self, running: int) -> float:
        return self.step + (self.full_step - self.step) * (running - 1) / (SLOTS - 1)


async def measure_alone(pools: Pools, flags: argparse.Namespace) -> AloneTimes:
    await pools.keep_busy(flags.kinds * 2 * flags.dit, 2 * flags.dit)  # every member has begun
    costs, overheads, seconds = {}, [], {}
    for kind in flags.kinds:
        answers = await pools.keep_busy([kind] * flags.alone, 1)
        seconds = {name: statistics.median(answer.seconds[name] for answer in answers) for name in answers[0].seconds}
        overheads += [answer.latency - sum(answer.seconds.values()) for answer in answers]
        report("times", size=size_name(kind.size), steps=kind.steps, **seconds)
        costs[kind] = costs_of(kind, seconds)
    # ``seconds`` are of the last kind, whose batch of eight sequences is decoded too.
    tokens = image_tokens(kind.size)
    step = seconds["decode"] / (tokens - 1)
    together = await pools.decode_seconds(kind, SLOTS)
    full = max(step, (together - SLOTS * seconds["prefill"]) / (tokens - 1))
    times = AloneTimes(costs, step, full, max(0.0, statistics.median(overheads)))
    report("steps", step_ms=step * 1e3, full_step_ms=full * 1e3, overhead=times.overhead)
    return times


def costs_of(kind: Kind, seconds: dict[str, float]) -> ImageCosts:
    rendering = Rendering(sum(seconds[part] for part in RENDERING), 0.0, seconds["encode"])
    return ImageCosts(image_tokens(kind.size), seconds["prefill"], rendering, decode=seconds["decode"])


def with_cores(fleet: Fleet, costs: Sequence[ImageCosts], most: float) -> Fleet:
    """Returns the fleet with as many cores as give ``most`` images a second, at most one for each member."""
    low, high = 0.0, float(1 + fleet.dit)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        shared = replace(fleet, cores=middle)
        if saturate_fleet(shared, costs, in_flight(fleet.dit)).throughput() < most:
            low = middle
        else:
            high = middle
    return replace(fleet, cores=high)


def in_flight(dit: int) -> int:
    return 3 * dit


async def measure_most(
    pools: Pools, kinds: list[Kind], alone: AloneTimes, flags: argparse.Namespace
) -> tuple[Fleet, float]:
    """Keeps all members in use; returns the fleet with the cores that it then has, and the images a second."""
    answers = await pools.keep_busy(kinds[: flags.busy], in_flight(flags.dit))
    most = rate_of(answers)
    fleet = with_cores(alone.fleet(flags.dit), [alone.costs[kind] for kind in kinds[: flags.busy]], most)
    report("most_a_second", measured=most, cores=fleet.cores)
    return fleet, most


def rate_of(answers: Sequence[Answer]) -> float:
    span = max(answer.answered for answer in answers) - min(answer.due for answer in answers)
    return len(answers) / span


def fleet_of_run(answers: Sequence[Answer], fleet: Fleet, policy: str) -> tuple[Fleet, list[ImageCosts]]:
    """Returns a fleet whose stages take the seconds that they took in a run, each member on cores of its own."""
    costs = [costs_of(answer.kind, answer.seconds) for answer in answers]
    steps = statistics.mean(answer.seconds["decode"] / (image_tokens(answer.kind.size) - 1) for answer in answers)
    overhead = statistics.median(answer.latency - sum(answer.seconds.values()) for answer in answers)
    return replace(fleet, policy=policy, cores=None, step=lambda _: steps, overhead=max(0.0, overhead)), costs


async def measure_policy(
    pools: Pools, policy: str, kinds: list[Kind], arrivals: list[float], fleet: Fleet, alone: AloneTimes
) -> None:
    pools.use(policy)
    began, (all_before, own_before) = time.monotonic(), busy_seconds()
    answers = await pools.send_at(kinds, arrivals)
    span, (all_after, own_after) = time.monotonic() - began, busy_seconds()
    own = (own_after - own_before) / span
    report("host", policy=policy, cores_used=own, by_others=(all_after - all_before) / span - own)
    predicted = simulate_fleet(replace(fleet, policy=policy), [alone.costs[kind] for kind in kinds], arrivals)
    compare(policy, "alone", predicted, answers)
    compare(policy, "run", simulate_fleet(*fleet_of_run(answers, fleet, policy), arrivals), answers)


def compare(policy: str, times: str, predicted: FleetOutcome, answers: Sequence[Answer]) -> None:
    measured = sorted(answer.latency for answer in answers)
    expected = sorted(predicted.latencies)
    rows = {
        "p50_seconds": (percentile(expected, 50), percentile(measured, 50)),
        "p99_seconds": (percentile(expected, 99), percentile(measured, 99)),
        "mean_seconds": (statistics.mean(expected), statistics.mean(measured)),
        "images_per_second": (predicted.throughput(), rate_of(answers)),
    }
    for name, (simulated, found) in rows.items():
        ratio = simulated / found
        within = abs(ratio - 1) <= WITHIN
        report(name, policy=policy, **{"from": times}, predicted=simulated, measured=found, ratio=ratio, within=within)


async def measure(ar: str, dit: Sequence[str], flags: argparse.Namespace) -> None:
    async with AsyncGlmImageClient(f"grpc://{ar}") as ar_client, _clients(dit) as dit_clients:
        seconds: dict[Kind, float] = {}
        pools = Pools(ar_client, dit_clients, seconds)
        alone = await measure_alone(pools, flags)
        seconds |= {kind: costs.rendering.denoise for kind, costs in alone.costs.items()}
        source = random.Random(f"kinds {flags.seed}")
        count = max(flags.busy, flags.requests)
        kinds = source.choices(flags.kinds, weights=(flags.share, 1 - flags.share), k=count)
        fleet, most = await measure_most(pools, kinds, alone, flags)
        kinds = kinds[: flags.requests]
        arrivals = poisson_arrivals(flags.load * most, len(kinds), flags.seed)
        for policy in flags.policies.split(","):
            await measure_policy(pools, policy, kinds, arrivals, fleet, alone)


@asynccontextmanager
async def _clients(urls: Sequence[str]) -> AsyncIterator[list[AsyncGlmImageClient]]:
    clients = [AsyncGlmImageClient(f"grpc://{url}") for url in urls]
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()


@contextmanager
def served(checkpoint: Path, dit: int) -> Iterator[tuple[str, list[str]]]:
    """Starts a server for each member; yields the gRPC addresses of the AR and of the DiT's members."""
    with ExitStack() as stack:

        def start(model: str) -> str:
            repository = stack.enter_context(repository_with(None, [f"{model}.devices=cpu"], model))
            settings = ServerSettings(checkpoint, model_repository=repository, drain_seconds=DRAIN_SECONDS)
            return stack.enter_context(TritonServer(settings)).grpc_url

        yield start("glm_ar"), [start("glm_dit") for _ in range(dit)]


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    if unknown := set(flags.policies.split(",")) - set(POLICIES):
        raise SystemExit(f"--policies has {min(unknown)!r}; allowed: {', '.join(POLICIES)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report("fleet", ar=1, dit=flags.dit, load=flags.load, average_load=os.getloadavg()[0])
    with checkpoint_of(flags) as checkpoint, served(checkpoint, flags.dit) as (ar, dit):
        asyncio.run(measure(ar, dit, flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())

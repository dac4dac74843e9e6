#!/usr/bin/env python3
"""Compares how the gateway chooses members of glm_dit with round robin, on a fleet of this machine behind Envoy.

    scripts/bench/fleet_routing.py [--checkpoint DIR] [--dit 2] [--requests 40] [--load 0.7] [--repeats 3] [--seed 0]

Each member computes with one thread. The requests of a mixed load, small images in few steps and large ones in many,
are rendered from prior tokens that were made before, through the gateway's own pools: once with its choice by predicted
seconds, which holds requests until a member has room, and once with round robin, which sends each immediately to the
next member. Both get the same requests at the same times; the policies take turns.

Prints JSON lines: ``times``, seconds of each kind alone; ``burst``, images a second where all requests are sent at
once; ``stream``, p50 and p99 of the latencies where they come at random times at ``--load`` of that rate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from measure import PROMPT, new_parser, parse, report
from served import percentile
from servers import tiny_checkpoint

from glm_image_client import PriorTokens
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.pools import pool as pool_module
from glm_image_gateway.pools.transport import PoolClient
from glm_image_gateway.routing import MemberLoad
from glm_image_gateway.services import pools_of
from glm_image_gateway.settings import GatewaySettings
from local_fleet.fleet import FleetSettings, LocalFleet
from local_fleet.state import wait_whole

POLICIES: Final = ("work", "round robin")


@dataclass(frozen=True)
class Kind:
    """Requests of one size; ``share`` of all are of it."""

    side: int
    steps: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.side}x{self.side}, {self.steps} steps"


KINDS: Final = (Kind(256, 4, 0.75), Kind(512, 20, 0.25))


class RoundRobin:
    """Chooses each member in turn, whatever it has."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def __call__(self, loads: Sequence[MemberLoad], images: int, draw: Callable[[int], int]) -> int | None:
        return next(self._turn) % len(loads) if loads else None


@contextlib.contextmanager
def chosen_by(policy: str) -> Iterator[None]:
    """Has the pools choose by a policy within the block."""
    if policy == "work":
        yield
    else:
        with patch.object(pool_module, "choose_dit", RoundRobin()):
            yield


class Load:
    """Sends requests to the pools of a fleet, as its gateway does."""

    def __init__(self, client: PoolClient, priors: Mapping[Kind, PriorTokens]) -> None:
        self._client, self._priors = client, priors

    async def render(self, kind: Kind, after: float = 0.0) -> float:
        """Renders an image ``after`` so many seconds; returns its latency."""
        await asyncio.sleep(after)
        began = time.perf_counter()
        await self._client.paint(PROMPT, self._priors[kind], num_inference_steps=kind.steps, timeout=600)
        return time.perf_counter() - began

    async def burst(self, kinds: Sequence[Kind]) -> float:
        """Sends all requests together; returns images a second."""
        began = time.perf_counter()
        await asyncio.gather(*(self.render(kind) for kind in kinds))
        return len(kinds) / (time.perf_counter() - began)

    async def stream(self, kinds: Sequence[Kind], times: Sequence[float]) -> list[float]:
        """Sends each request at its time; returns their latencies, in order of length."""
        return sorted(await asyncio.gather(*map(self.render, kinds, times)))


async def compare(fleet: LocalFleet, flags: argparse.Namespace) -> None:
    """Measures both policies on a running fleet, and prints the results."""
    rng = random.Random(flags.seed)
    settings = GatewaySettings(ar=fleet.member_urls("ar"), dit=fleet.member_urls("dit"), proxy=fleet.envoy_url)
    pools = pools_of(settings, Metrics())
    pools.start()
    async with PoolClient(pools) as client:
        while not await client.server_ready():
            await asyncio.sleep(0.1)
        load = Load(client, {kind: await _prior(client, kind) for kind in KINDS})
        for kind in KINDS:
            seconds = [await load.render(kind) for _ in range(3)]
            report("times", kind=kind.name, seconds=statistics.median(seconds))
        kinds = rng.choices(KINDS, [kind.share for kind in KINDS], k=flags.requests)
        rates: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for repeat in range(flags.repeats):
            for policy in _in_turn(repeat):
                with chosen_by(policy):
                    rates[policy].append(await load.burst(kinds))
        for policy in POLICIES:
            report("burst", policy=policy, images_a_second=statistics.median(rates[policy]), runs=rates[policy])
        rate = flags.load * statistics.median(rates["work"])
        times = list(itertools.accumulate(rng.expovariate(rate) for _ in kinds))
        latencies: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for repeat in range(flags.repeats):
            for policy in _in_turn(repeat):
                with chosen_by(policy):
                    latencies[policy] += await load.stream(kinds, times)
        for policy in POLICIES:
            ordered = sorted(latencies[policy])
            tails = {f"p{percent}": percentile(ordered, percent) for percent in (50, 90, 99)}
            report("stream", policy=policy, requests=len(ordered), **tails)


async def _prior(client: PoolClient, kind: Kind) -> PriorTokens:
    return await client.prior_tokens(PROMPT, width=kind.side, height=kind.side, seed=1)


def _in_turn(repeat: int) -> tuple[str, ...]:
    return POLICIES if repeat % 2 == 0 else POLICIES[::-1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser("fleet_routing", __doc__)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--dit", type=int, default=2, help="members of glm_dit (%(default)s)")
    parser.add_argument("--requests", type=int, default=40, help="in each run (%(default)s)")
    parser.add_argument("--load", type=float, default=0.7, help="share of the highest rate (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each policy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the load (%(default)s)")
    flags: Any = parse(parser, arguments, {"requests": 6, "repeats": 1})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder)) if flags.checkpoint is None else flags.checkpoint.absolute()
        with LocalFleet(FleetSettings(checkpoint, dit=flags.dit), lambda line: None) as fleet:
            wait_whole(fleet, "the start")
            asyncio.run(compare(fleet, flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())

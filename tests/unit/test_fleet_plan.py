"""The simulation of pools: closed forms, invariants of every simulation, lost hosts, routing, the command."""

from __future__ import annotations

import json
import math
import random
import statistics
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from capacity_planner import cli, fleet_plan, mixes
from capacity_planner.dispatch import POLICIES, Dispatcher, Member
from capacity_planner.fleet_cli import MEASURED, lines
from capacity_planner.pool_simulation import Fleet, HostLoss, ImageCosts, Scaling, saturate_fleet, simulate_fleet
from capacity_planner.simulated_dit import Rendering
from capacity_planner.simulation import poisson_arrivals
from capacity_planner.times import read_measured
from glm_image.request.geometry import Size
from glm_image_gateway.routing import REQUESTS_PER_INSTANCE, choose_dit

SQUARE = Size(1024, 1024)
H200 = read_measured(list(MEASURED))
BRIEF = fleet_plan.Trial(requests_per_card=5)


def image(seconds: float, *, tokens: int = 2, prefill: float = 0.0) -> ImageCosts:
    return ImageCosts(tokens, prefill, Rendering(seconds), decode=0.01 * tokens)


def fleet(ar: int, dit: int, step: float = 0.0, **options: Any) -> Fleet:
    return Fleet(ar, dit, lambda _: step, **options)


def test_result_files_of_an_h200_are_read() -> None:
    assert H200.denoise_step(SQUARE) == pytest.approx(9.3825 / 50)
    assert H200.step(8) == pytest.approx(0.0047486)
    # Eight sequences with 3,632 tokens more each take 0.43 ms more.
    assert H200.cached_token * 8 * 3632 == pytest.approx(0.0051828 - 0.0047486)
    assert (H200.of_source.step, H200.of_source.condition) == pytest.approx((0.0216398, 0.1434))
    assert H200.of_source.tower + H200.of_source.prefill == pytest.approx(0.0217 + 0.025, abs=1e-3)


def test_an_edit_has_no_preview_and_denoises_longer() -> None:
    text, edit = (mixes.image_costs(mixes.Kind(SQUARE, 50, sources), H200) for sources in (0, 1))
    assert (text.tokens, edit.tokens) == (1280, 1024)
    assert edit.rendering.denoise - text.rendering.denoise == pytest.approx(50 * 0.0216398 + 0.1434)


def test_a_single_request_takes_the_seconds_of_both_stages() -> None:
    costs = mixes.image_costs(mixes.Kind(SQUARE, 50), H200)
    outcome = simulate_fleet(Fleet(1, 1, H200.step), [costs], [0.0])
    rendering = costs.rendering.denoise + costs.rendering.finish + costs.rendering.encode
    decoding = costs.prefill + 1279 * (H200.step(1) + costs.added_step)
    assert outcome.latencies == pytest.approx([decoding + rendering])


def test_one_member_serves_as_in_m_d_1() -> None:
    arrivals = poisson_arrivals(0.5, 2000, seed=1)
    outcome = simulate_fleet(fleet(1, 1), [image(1.0)] * 2000, arrivals)
    waits = [seconds - 1 for seconds in outcome.latencies[200:]]
    assert statistics.mean(waits) == pytest.approx(0.5 / (2 * 0.5), rel=0.12)


def test_saturated_throughput_is_that_of_the_slower_pool() -> None:
    assert saturate_fleet(fleet(1, 3), [image(3.0)] * 300, 14).throughput(0.1) == pytest.approx(1.0, rel=0.02)
    slow_ar = image(0.1, tokens=101, prefill=0.1)
    # A round of each of both members is eight prompts and a hundred steps.
    found = saturate_fleet(fleet(2, 3, 0.08), [slow_ar] * 800, 32).throughput(0.1)
    assert found == pytest.approx(2 * 8 / 8.8, rel=0.05)


@given(
    ar=st.integers(1, 3),
    dit=st.integers(1, 6),
    policy=st.sampled_from(POLICIES),
    gateways=st.integers(1, 3),
    cards_per_host=st.integers(1, 4),
    losses=st.lists(st.tuples(st.floats(0, 20), st.integers(0, 3), st.floats(0, 10)), max_size=3),
    scales=st.booleans(),
    rate=st.floats(0.2, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_every_request_is_answered_and_no_faster_than_alone(
    ar: int,
    dit: int,
    policy: str,
    gateways: int,
    cards_per_host: int,
    losses: list[tuple[float, int, float]],
    scales: bool,
    rate: float,
    seed: int,
) -> None:
    source = random.Random(seed)
    costs = [image(source.choice([0.5, 4.0]), tokens=20, prefill=0.02) for _ in range(30)]
    lossy = fleet(
        ar,
        dit,
        0.01,
        slots=4,
        policy=policy,
        gateways=gateways,
        cards_per_host=cards_per_host,
        detect_seconds=1.0,
        overhead=0.01,
        # The same host is not lost again while it is away.
        losses=[HostLoss(*loss) for loss in {loss[1]: loss for loss in losses}.values()],
        scaling=Scaling(2.0, lag=3.0, most=dit + 4, interval=1.0, calm=5.0) if scales else None,
    )
    arrivals = poisson_arrivals(rate, 30, seed)
    outcome = simulate_fleet(lossy, costs, arrivals, seed)
    assert outcome.arrived == pytest.approx(arrivals)
    for cost, came, decoded, answered in zip(costs, outcome.arrived, outcome.decoded, outcome.answered, strict=True):
        assert decoded - came >= 0.01 + 0.02 + 19 * 0.01 - 1e-6
        assert answered - decoded >= cost.rendering.denoise - 1e-6
    if not losses:
        assert not any(outcome.retries)
    assert simulate_fleet(lossy, costs, arrivals, seed) == outcome


@given(loads=st.lists(st.lists(st.floats(0.1, 9), max_size=REQUESTS_PER_INSTANCE), min_size=1, max_size=5))
@settings(max_examples=30)
def test_the_gateway_chooses_as_its_own_code_does_among_all_members(loads: list[list[float]]) -> None:
    """``choose_dit`` gets two members that have room, not all: with the same two drawn it chooses the same one."""
    members = [Member(None, index) for index in range(len(loads))]
    rooms = [index for index, load in enumerate(loads) if len(load) < REQUESTS_PER_INSTANCE]
    for first, second in permutations(rooms, 2) if len(rooms) > 1 else [(index, index) for index in rooms]:
        two = sorted({first, second}, key=[first, second].index)
        clock = simpy.Environment()
        dispatcher = Dispatcher(clock, members, "gateway", 0, _Drawing([members[index] for index in two]))
        for index, load in enumerate(loads):
            for number, seconds in enumerate(load):
                dispatcher._at(members[index]).add(number, seconds, 1, 0.0)
        seen = [dispatcher._at(member).load(0.0) for member in members]
        without_first = [index for index in rooms if index != first]
        draws = [without_first.index(second) if without_first else 0, rooms.index(first)]
        expected = choose_dit(seen, 1, lambda _, draws=draws: draws.pop())  # type: ignore[misc]
        place = dispatcher.place("new", 1.0)
        assert expected is not None
        assert place.value is members[expected]


class _Drawing(random.Random):
    """Draws the given members, in any order of the two."""

    def __init__(self, two: list[Member]) -> None:
        super().__init__()
        self._two = two

    def sample(self, population: Any, k: int, **_: Any) -> Any:
        assert set(map(id, self._two)) <= set(map(id, population))
        assert k == len(self._two)
        return self._two

    def randrange(self, *_: Any) -> int:
        return 0


def test_a_member_that_is_full_keeps_the_request_at_the_gateway() -> None:
    """Three images, one member: the third is sent when the first is answered, so a member that is lost has two."""
    outcome = simulate_fleet(
        fleet(1, 1, cards_per_host=1, detect_seconds=0.5, losses=[HostLoss(0.6, 1, 1.0)]), [image(1.0)] * 3, [0.0] * 3
    )
    assert outcome.retries == [1, 1, 0]
    # Back a second after its loss, the member renders all three; the two follow the third, which waits since before.
    assert outcome.answered == pytest.approx([3.6, 4.6, 2.6], abs=0.01)


def test_a_lost_host_costs_its_requests_a_retry_and_others_take_them() -> None:
    lossy = fleet(1, 4, cards_per_host=1, detect_seconds=2.0, losses=[HostLoss(5.0, 1, 1000.0)])
    arrivals = [float(index) for index in range(20)]
    outcome = simulate_fleet(lossy, [image(2.0)] * 20, arrivals, seed=3)
    assert 1 <= sum(outcome.retries) <= REQUESTS_PER_INSTANCE + 1
    assert max(outcome.answered) < 40


def test_work_moves_to_added_members() -> None:
    slow, fast = (
        simulate_fleet(
            fleet(1, 2, scaling=Scaling(2.0, lag=lag, most=8, interval=1.0)),
            [image(1.0)] * 300,
            poisson_arrivals(4.0, 300, seed=2),
        )
        for lag in (30.0, 2.0)
    )
    assert max(count for _, count in fast.members) > 4
    assert max(count for _, count in fast.members) <= 8
    assert statistics.mean(fast.latencies) < statistics.mean(slow.latencies) / 2


def test_routing_by_seconds_beats_round_robin_on_mixed_sizes() -> None:
    mix = mixes.mix_named("sizes", SQUARE, 50)
    pools, trial = Fleet(2, 30, H200.step), fleet_plan.Trial(0.8, 5)
    ours, turns = fleet_plan.compare_routing(pools, mix, H200, trial, ("gateway", "round-robin"))
    assert ours.images_per_second > 1.15 * turns.images_per_second
    assert ours.p50 < turns.p50 / 2
    assert ours.p99 < turns.p99
    assert ours.p99_of_small < turns.p99_of_small


def test_the_best_division_gives_the_ar_its_share_of_the_seconds() -> None:
    mix = mixes.mix_named("t2i", SQUARE, 50)
    found, most = fleet_plan.best_pools(64, mix, H200, BRIEF)
    assert (found.ar, found.dit) in {(5, 59), (6, 58)}
    assert most == pytest.approx(found.dit / 9.52, rel=0.08)
    estimate = fleet_plan.pools_estimate(found, most, mix, H200, BRIEF)
    lost = fleet_plan.lost_host(estimate, found, mix, H200, 60.0, BRIEF)
    # The host has one member of the AR, and seven of the DiT.
    ar = 0.0177144 + 1280 * 0.0048071 / 8
    assert lost.images_per_second == pytest.approx(min((found.ar - 1) / ar, (found.dit - 7) / 9.52), rel=0.03)
    assert 1 <= lost.retried <= 7 * REQUESTS_PER_INSTANCE + 2 * 8
    assert lost.p99 > estimate.p50


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    brief = ["fleet", "--cards", "8", "--mixes", "t2i", "--compared-cards", "8", "--requests", "1", "--lags", "5"]
    assert cli.main([*brief, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["pools"]
    assert (row["ar"], row["dit"], row["lost_host"]["images_per_second"]) == (1, 7, 0)
    assert [row["policy"] for row in found["routing"]] == list(POLICIES)
    assert [row["lag"] for row in found["scaling"]] == [5]
    assert all(math.isfinite(row["p99"]) for part in ("pools", "routing", "scaling") for row in found[part])
    text = "\n".join(lines(found))
    assert "nvidia-h200-ar.json" in text
    assert "    8 t2i         1 + 7" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cards 8,few", "--cards is 8,few; allowed: numbers from 2 to 10000"),
        ("--cards 1", "--cards is 1; allowed: numbers from 2"),
        ("--mixes t2i,all", "--mixes is t2i,all; allowed: t2i, i2i, both, sizes"),
        ("--parts all", "--parts is all; allowed: pools, routing, scaling"),
        ("--load 1.5", "--load is 1.5; allowed: 0.01 to 0.99"),
        ("--compared-cards 1", "--compared-cards is 1; allowed: 2 to 10000"),
        ("--measured /no/such/file", "/no/such/file: no JSON lines or result file of a benchmark"),
    ],
)
def test_a_refused_flag_is_named(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert cli.main(["fleet", *arguments.split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_default_times_are_there() -> None:
    assert all(Path(path).is_file() for path in MEASURED)

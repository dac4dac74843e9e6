"""The simulation against closed forms of queueing theory, and invariants of every simulation."""

from __future__ import annotations

import heapq
import math
import statistics

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from capacity_planner.simulated_device import SimulatedDevice
from capacity_planner.simulation import (
    Deployment,
    Outcome,
    StageCosts,
    percentile,
    poisson_arrivals,
    saturate,
    simulate,
)
from glm_image.ar.admission import ADMISSIONS

REQUESTS = 12_000


def dit_costs(seconds: float = 1.0, *, exponential: bool = False) -> StageCosts:
    """Costs that are all of the DiT stage."""
    sample = (lambda source: source.expovariate(1 / seconds)) if exponential else (lambda _: seconds)
    return StageCosts(tokens=2, prefill=0.0, step=lambda _: 0.0, denoise=sample)


def mean_wait(outcome: Outcome) -> float:
    waits = [begin - end for end, begin in zip(outcome.decoded, outcome.denoise_started, strict=True)]
    return statistics.mean(waits[len(waits) // 10 :])


def dit_instances(count: int, slots: int = 8) -> Deployment:
    return Deployment(("ar",), tuple(f"dit {index}" for index in range(count)), slots)


def erlang_c(servers: int, offered: float) -> float:
    """The chance that an arrival waits, of ``offered`` erlangs over ``servers`` (M/M/c)."""
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize("load", [0.4, 0.8])
def test_constant_service_waits_as_in_m_d_1(load: float) -> None:
    outcome = simulate(dit_instances(1), dit_costs(), poisson_arrivals(load, REQUESTS, seed=1))
    assert mean_wait(outcome) == pytest.approx(load / (2 * (1 - load)), rel=0.08)


@pytest.mark.parametrize(("count", "load"), [(1, 0.5), (2, 0.5)])
def test_exponential_service_waits_as_in_m_m_c(count: int, load: float) -> None:
    rate = load * count
    outcome = simulate(dit_instances(count), dit_costs(exponential=True), poisson_arrivals(rate, REQUESTS, seed=2))
    assert mean_wait(outcome) == pytest.approx(erlang_c(count, rate) / (count - rate), rel=0.1)


@pytest.mark.parametrize(("count", "load"), [(1, 0.95), (3, 0.8), (7, 0.99)])
def test_images_wait_for_the_first_free_instance(count: int, load: float) -> None:
    """Every single wait, against the recursion of Kiefer and Wolfowitz."""
    arrivals = poisson_arrivals(load * count, 2000, seed=7)
    outcome = simulate(dit_instances(count), dit_costs(exponential=True), arrivals)
    free = [0.0] * count
    for decoded, begun, answered in zip(outcome.decoded, outcome.denoise_started, outcome.answered, strict=True):
        assert begun == pytest.approx(max(decoded, heapq.heappop(free)), abs=1e-6)
        heapq.heappush(free, answered)


def test_a_shared_device_serves_as_in_m_m_1_processor_sharing() -> None:
    """So many instances on one device that no request waits: the mean time is s / (1 - load)."""
    layout = Deployment(("ar",), ("host",) * 60)
    outcome = simulate(layout, dit_costs(exponential=True), poisson_arrivals(0.6, REQUESTS, seed=3))
    assert statistics.mean(outcome.latencies[1000:]) == pytest.approx(1 / (1 - 0.6), rel=0.08)


def test_sequences_decode_together_in_the_slots() -> None:
    """Four concurrent requests over two slots: two rounds of ten steps, each after two prompts."""
    work = StageCosts(tokens=11, prefill=1.0, step=lambda running: 0.1 * running, denoise=lambda _: 0.0)
    outcome = simulate(dit_instances(1, slots=2), work, [0.0] * 4)
    assert outcome.decoded == pytest.approx([4.0, 4.0, 8.0, 8.0])


def test_a_sequence_joins_between_steps() -> None:
    """The second arrives after 2.5 of 10 steps: the third step ends, its prompt is read, and both continue."""
    work = StageCosts(tokens=11, prefill=1.0, step=lambda _: 1.0, denoise=lambda _: 0.0)
    outcome = simulate(dit_instances(1), work, [0.0, 3.5])
    assert outcome.decoded == pytest.approx([1 + 3 + 1 + 7, 1 + 3 + 1 + 10])


ON_ONE_CARD = StageCosts(tokens=101, prefill=0.1, step=lambda _: 0.05, denoise=lambda _: 10.0)
"""Decoding takes half of the time of denoising, for one sequence or eight."""


def test_gathered_admission_saves_time_of_a_shared_card() -> None:
    """Admitted immediately, a sequence decodes alone after each image; gathered sequences share their steps."""
    at_once, gathered = (
        saturate(Deployment(("card",), ("card",), admission=admission), ON_ONE_CARD, 200).throughput
        for admission in ("at_once", "gathered")
    )
    assert gathered > 1.1 * at_once
    assert gathered == pytest.approx(1 / (10 + 0.1 + 5 / 8), rel=0.07)


def test_gathered_admission_does_not_delay_a_single_request() -> None:
    layout = Deployment(("card",), ("card",), admission="gathered")
    outcome = simulate(layout, ON_ONE_CARD, [0.0, 30.0, 60.0])
    assert outcome.latencies == pytest.approx([15.1] * 3)


def test_gathered_sequences_wait_for_the_dit_load() -> None:
    """Four arrive during the second of three images: they decode together, during the third."""
    layout = Deployment(("card",), ("card",), admission="gathered")
    outcome = simulate(layout, ON_ONE_CARD, [0.0, 0.01, 0.02, 17.0, 18.0, 19.0, 20.0])
    # Four prompts and a hundred steps, at half of the card's speed.
    assert outcome.decoded[3:] == pytest.approx([outcome.denoise_started[2] + 2 * (4 * 0.1 + 5)] * 4)


def test_the_next_image_is_denoised_while_the_vae_decodes_one() -> None:
    work = StageCosts(
        tokens=2, prefill=0.0, step=lambda _: 0.0, denoise=lambda _: 2.0, finish=1.0, encode=0.5, overhead=0.25
    )
    apart = simulate(Deployment(("ar",), ("dit",), cores=2.0), work, [0.0, 0.0])
    assert apart.answered == pytest.approx([0.25 + 2 + 1.5, 0.25 + 4 + 1.5])
    shared = simulate(Deployment(("ar",), ("dit",)), work, [0.0, 0.0])  # the VAE takes time from denoising
    assert shared.answered == pytest.approx([0.25 + 2 + 2 + 0.5, 0.25 + 5 + 1.5])


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 10)), min_size=1, max_size=12),
    st.floats(0.5, 4),
)
@settings(max_examples=50)
def test_a_device_runs_every_task_no_faster_than_its_cores_allow(jobs: list[tuple[float, float]], cores: float) -> None:
    clock = simpy.Environment()
    device = SimulatedDevice(clock, cores)
    took: list[tuple[float, float]] = []

    def ask(start: float, seconds: float):  # type: ignore[no-untyped-def] # noqa: ANN202
        yield clock.timeout(start)
        yield device.work(seconds).done
        took.append((seconds, clock.now - start))

    for start, seconds in jobs:
        clock.process(ask(start, seconds))
    clock.run()
    assert len(took) == len(jobs)
    assert all(spent >= seconds * max(1.0, 1 / cores) - 1e-6 for seconds, spent in took)
    total = sum(seconds for _, seconds in jobs)
    assert clock.now <= max(start for start, _ in jobs) + total * max(1.0, 1 / cores) + 1e-6
    assert clock.now >= min(start for start, _ in jobs) + total / max(cores, 1.0) / len(jobs) - 1e-6


@given(
    ar=st.integers(1, 2),
    dit=st.integers(1, 5),
    slots=st.integers(1, 8),
    shared=st.booleans(),
    admission=st.sampled_from(ADMISSIONS),
    tokens=st.integers(2, 40),
    rate=st.floats(0.1, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_every_request_is_answered_in_order_and_no_faster_than_alone(
    ar: int, dit: int, slots: int, shared: bool, admission: str, tokens: int, rate: float, seed: int
) -> None:
    work = StageCosts(
        tokens=tokens,
        prefill=0.02,
        step=lambda running: 0.01 + 0.001 * running,
        denoise=lambda source: source.uniform(0.5, 1.5),
        finish=0.1,
        encode=0.05,
        overhead=0.01,
    )
    names = ("host",) * (ar + dit) if shared else tuple(map(str, range(ar + dit)))
    layout = Deployment(names[:ar], names[ar:], slots, admission=admission)
    arrivals = poisson_arrivals(rate, 40, seed)
    outcome = simulate(layout, work, arrivals, seed)
    assert outcome.arrived == pytest.approx(arrivals)
    decoding = work.prefill + (tokens - 1) * work.step(1)
    for came, decoded, begun, answered in zip(*vars(outcome).values(), strict=True):
        assert decoded - came >= work.overhead + decoding - 1e-6
        assert begun >= decoded
        assert answered - begun >= 0.5 + work.finish + work.encode - 1e-6
    # DiT instances take images in the order in which their tokens are complete, one at a time. Two AR instances that
    # admit a sequence on the same report may complete at the same moment.
    by_tokens = sorted(range(40), key=lambda index: (outcome.decoded[index], outcome.denoise_started[index]))
    begun = [outcome.denoise_started[index] for index in by_tokens]
    assert begun == sorted(begun)
    starts, ends = outcome.denoise_started, outcome.answered
    for now in starts:
        assert sum(begin <= now < end - 0.15 - 1e-6 for begin, end in zip(starts, ends, strict=True)) <= dit * 4
    assert simulate(layout, work, arrivals, seed) == outcome


def test_saturated_throughput_is_that_of_the_slowest_stage() -> None:
    slow_dit = StageCosts(tokens=101, prefill=0.0, step=lambda _: 0.01, denoise=lambda _: 3.0)
    assert saturate(dit_instances(3), slow_dit, 600).throughput == pytest.approx(1.0, rel=0.02)
    slow_decoder = StageCosts(tokens=101, prefill=0.1, step=lambda _: 0.08, denoise=lambda _: 0.1)
    # A round is eight prompts and a hundred steps.
    assert saturate(dit_instances(3), slow_decoder, 800).throughput == pytest.approx(8 / 8.8, rel=0.02)


def test_arrivals_are_poisson() -> None:
    arrivals = poisson_arrivals(4.0, 20_000, seed=5)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert arrivals == poisson_arrivals(4.0, 20_000, seed=5) != poisson_arrivals(4.0, 20_000, seed=6)


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(1, 100))
def test_percentile_is_the_smallest_value_not_exceeded_by_that_share(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    at_least = percent / 100 * len(values) - 1e-9
    assert sum(value <= found for value in values) >= at_least
    smaller = [value for value in values if value < found]
    assert not smaller or len(smaller) < at_least + 1e-6


def test_costs_are_independent_of_arrivals() -> None:
    """Otherwise long images would follow long gaps."""
    arrivals = poisson_arrivals(1e-3, 2000, seed=4)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    outcome = simulate(dit_instances(1), dit_costs(exponential=True), arrivals, seed=4)
    assert abs(statistics.correlation(gaps, outcome.latencies)) < 0.1

"""Deficit round robin: even shares, no starvation, no idle device, images of a flow in their order."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_image.dit.fair_queue import DeficitRoundRobin

QUANTUM = 0.5
COSTS = st.floats(0.001, 60)
IMAGES = st.lists(COSTS, min_size=1, max_size=8)


class Device:
    """Runs images one at a time by the policy; ``actual`` says what an image really takes."""

    def __init__(self, quantum: float = QUANTUM) -> None:
        self.policy: DeficitRoundRobin[str] = DeficitRoundRobin(quantum)
        self.waiting: dict[str, deque[tuple[float, float]]] = {}
        self.order: list[str] = []
        self.used: dict[str, float] = {}
        self.now = 0.0

    def add(self, flow: str, *images: float, actual: float = 1.0) -> None:
        self.policy.add(flow)
        self.waiting[flow] = deque((cost, cost * actual) for cost in images)
        self.used[flow] = 0.0

    def run_one(self) -> str | None:
        flow = self.policy.next({name: images[0][0] for name, images in self.waiting.items()})
        if flow is None:
            return None
        _, took = self.waiting[flow].popleft()
        self.policy.charge(flow, took)
        self.now += took
        self.used[flow] += took
        self.order.append(flow)
        if not self.waiting[flow]:
            del self.waiting[flow]
            self.policy.remove(flow)
        return flow

    def run_all(self) -> str:
        while self.run_one():
            pass
        return "".join(self.order)


def device(**flows: tuple[float, ...]) -> Device:
    made = Device()
    for name, images in flows.items():
        made.add(name, *images)
    return made


def test_equal_single_images_run_in_the_order_of_arrival() -> None:
    assert device(a=(8.0,), b=(8.0,), c=(8.0,)).run_all() == "abc"


def test_images_of_two_requests_alternate() -> None:
    assert device(a=(4.0,) * 4, b=(4.0,) * 2).run_all() == "ababaa"


def test_request_of_many_images_delays_a_small_one_by_one_image() -> None:
    made = device(a=(4.5,) * 8)
    made.run_one()
    made.add("b", 0.05)
    made.run_one()
    assert made.order == ["a", "b"]
    assert made.run_all() == "ab" + "a" * 7


def test_cheap_images_run_more_often() -> None:
    order = device(a=(6.0,) * 3, b=(1.0,) * 18).run_all()
    assert order.count("b", 0, order.rindex("a")) in {17, 18}
    shares = [order.count("b", 0, index) for index, flow in enumerate(order) if flow == "a"]
    assert all(abs(share - 6 * number) <= 6 for number, share in enumerate(shares, 1))


def test_flow_that_took_longer_than_predicted_waits_for_it() -> None:
    made = Device()
    made.add("a", *(1.0,) * 8, actual=3.0)
    made.add("b", *(1.0,) * 24)
    made.run_all()
    half = made.order[: len(made.order) // 2]
    assert abs(3 * half.count("a") - half.count("b")) <= 5


def test_without_an_image_there_is_no_next_flow() -> None:
    policy: DeficitRoundRobin[str] = DeficitRoundRobin()
    assert policy.next({}) is None
    policy.add("a")
    policy.add("b")
    assert policy.next({"b": 3600.0}) == "b", "one that has nothing to run is not visited"
    assert policy.next({"a": 1e-6}) == "a"


@given(st.dictionaries(st.sampled_from("abcd"), IMAGES, min_size=1), st.sampled_from([0.01, 0.5, 30.0]))
def test_every_image_runs_once_and_the_device_is_never_idle(flows: dict[str, list[float]], quantum: float) -> None:
    made = Device(quantum)
    for name, images in flows.items():
        made.add(name, *images)
    order = made.run_all()
    assert {name: order.count(name) for name in flows} == {name: len(images) for name, images in flows.items()}
    assert made.now == pytest.approx(sum(map(sum, flows.values())))


@given(
    st.lists(IMAGES, min_size=2, max_size=4),
    st.sampled_from([0.01, 0.5, 30.0]),
    st.floats(0.5, 2),
)
def test_seconds_of_two_busy_flows_differ_by_two_quanta_and_an_image_of_each(
    flows: list[list[float]], quantum: float, actual: float
) -> None:
    """Predictions are wrong by up to a factor of two."""
    made = Device(quantum)
    for name, images in zip("abcd", flows, strict=False):
        made.add(name, *images, actual=actual)
    largest = dict(zip("abcd", (max(images) * max(actual, 1) for images in flows), strict=False))
    while len(made.waiting) == len(flows):
        for one in flows_of(made):
            for other in flows_of(made):
                bound = 2 * quantum + largest[one] + largest[other]
                assert abs(made.used[one] - made.used[other]) <= bound + 1e-6
        made.run_one()


def flows_of(made: Device) -> list[str]:
    return list(made.waiting)


@given(st.lists(st.tuples(COSTS, st.integers(0, 5)), min_size=1, max_size=12), COSTS)
def test_no_stream_of_other_requests_starves_a_flow(arrivals: list[tuple[float, int]], cost: float) -> None:
    """New requests come after every image; the flow's image runs before the others have had many times its seconds."""
    made = Device()
    made.add("flow", cost)
    for number, (image, _) in enumerate(arrivals[:3]):
        made.add(str(number), image)
    others = 0.0
    for number in range(10_000):
        flow = made.run_one()
        if flow == "flow":
            break
        image = arrivals[number % len(arrivals)][0]
        others = made.now
        made.add(f"later {number}", image)
    assert flow == "flow"
    largest = max(image for image, _ in arrivals)
    assert others <= 4 * (cost + QUANTUM) + 4 * largest

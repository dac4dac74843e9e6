"""The choice of a pool's member, and the prediction of work, by hand-made loads and by a simulation on paper."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_image_gateway.routing import (
    CHEAP,
    MemberLoad,
    Outstanding,
    Predictor,
    Work,
    choose_ar,
    choose_dit,
    dit_work,
    share_out,
)


def first(_: int) -> int:
    return 0


def last(count: int) -> int:
    return count - 1


def test_of_two_members_drawn_the_less_loaded_renders() -> None:
    loads = [MemberLoad(9.0, 1, 2), MemberLoad(1.0, 1, 2), MemberLoad(5.0, 1, 2)]
    assert choose_dit(loads[:2], 1, first) == 1
    assert choose_dit([loads[0], loads[2]], 1, last) == 1
    # Twice the work on four instances is done sooner.
    assert choose_dit([MemberLoad(8.0, 4, 8, instances=4), MemberLoad(4.0, 1, 2)], 1, first) == 0


def test_a_full_member_renders_nothing_more_unless_it_is_idle() -> None:
    full, idle = MemberLoad(0.1, 2, 2), MemberLoad(0.0, 0, 2)
    assert choose_dit([full, full], 1, first) is None
    assert choose_dit([full, idle], 8, first) == 1
    assert choose_dit([], 1, first) is None


def test_a_batch_is_filled_first_where_that_is_cheap() -> None:
    idle = MemberLoad(0.0, 0, 8)
    begun = MemberLoad(9.0, 3, 8, batch_seconds=9.0)
    fuller = MemberLoad(9.0, 6, 8, batch_seconds=8.0)
    ending = MemberLoad(1.0, 7, 8, batch_seconds=10 * (1 - CHEAP) - 0.1)
    assert choose_ar([idle, begun, fuller, ending], 1, 10.0, first) == 2
    assert choose_ar([idle, begun, fuller], 4, 10.0, first) == 1
    assert choose_ar([idle, ending], 1, 10.0, first) == 0
    assert choose_ar([ending, MemberLoad(1.0, 1, 8, batch_seconds=7.2)], 1, 10.0, first) == 0
    assert choose_ar([MemberLoad(1.0, 8, 8, batch_seconds=1.0)], 1, 10.0, first) is None


def test_outstanding_work_shrinks_while_it_runs_and_ends_with_its_removal() -> None:
    work = Outstanding(instances=1, most=2)
    work.add("a", 10.0, 1, now=100.0)
    work.add("b", 4.0, 1, now=100.0)
    assert work.load(100.0).seconds == 14.0
    assert work.load(106.0).seconds == 8.0
    assert work.load(120.0).seconds == pytest.approx(5.0)  # late: a tenth of its time is left
    work.remove("a", 120.0)
    assert work.load(121.0).seconds == 3.0
    work.remove("b", 124.0)
    assert work.load(124.0) == MemberLoad(0.0, 0, 2)


def test_predictions_follow_what_was_measured() -> None:
    predictor = Predictor(1.0)
    small, large = Work("small", 10.0), Work("large", 100.0)
    assert predictor.seconds(large) == 100.0
    predictor.add(small, 5.0)
    assert (predictor.seconds(small), predictor.seconds(large)) == (5.0, 50.0)
    predictor.add(large, 80.0)
    assert predictor.seconds(large) == 80.0
    predictor.add(large, 0.0)
    assert predictor.seconds(large) == 80.0


def test_work_grows_with_pixels_steps_branches_and_sources() -> None:
    base = dit_work(512 * 512, 1, 20, 1.0)
    assert dit_work(512 * 512, 2, 20, 1.0).units == pytest.approx(2 * base.units)
    assert dit_work(512 * 512, 1, 20, 1.5).units == pytest.approx(2 * base.units)
    assert dit_work(2048 * 2048, 1, 20, 1.0).units > 16 * base.units
    assert dit_work(512 * 512, 1, 20, 1.0, sources=1).units > base.units


@given(st.integers(1, 10), st.integers(0, 20))
def test_the_images_of_a_request_are_shared_out_evenly(images: int, members: int) -> None:
    counts = share_out(images, members)
    assert sum(counts) == images
    assert len(counts) <= max(1, members)
    assert max(counts) - min(counts) <= 1


def test_routing_by_work_beats_round_robin_on_a_mixed_load() -> None:
    """Requests of 2048x2048 take 20 times those of 512x512; members take one after the other, in order."""
    by_work, in_turn = _latencies(by_work=True), _latencies(by_work=False)
    assert _quantile(by_work, 0.5) < _quantile(in_turn, 0.5)
    assert _quantile(by_work, 0.99) < _quantile(in_turn, 0.99)


def _latencies(*, by_work: bool, members: int = 8, requests: int = 4000) -> list[float]:
    """Latencies at 85 % of the members' capacity; by work, requests wait for a member with room."""
    draw = random.Random(7)
    sizes = [20.0 if draw.random() < 0.2 else 1.0 for _ in range(requests)]
    mean = sum(sizes) / len(sizes)
    now, arrivals = 0.0, []
    for _ in sizes:
        now += draw.expovariate(0.85 * members / mean)
        arrivals.append(now)
    if not by_work:
        free = [0.0] * members
        ends = []
        for index, (at, size) in enumerate(zip(arrivals, sizes, strict=True)):
            member = index % members
            free[member] = max(free[member], at) + size
            ends.append(free[member])
        return [end - at for end, at in zip(ends, arrivals, strict=True)]
    return _late_binding(arrivals, sizes, members, draw)


def _late_binding(arrivals: list[float], sizes: list[float], members: int, draw: random.Random) -> list[float]:
    work = [Outstanding(instances=1, most=2) for _ in range(members)]
    free = [0.0] * members
    waiting: list[int] = []
    latencies: list[float] = []
    events = [(at, 0, index, -1) for index, at in enumerate(arrivals)]
    heapq.heapify(events)
    while events:
        now, is_end, index, member = heapq.heappop(events)
        if is_end:
            work[member].remove(index, now)
            latencies.append(now - arrivals[index])
        else:
            waiting.append(index)
        while waiting:
            chosen = choose_dit([each.load(now) for each in work], 1, draw.randrange)
            if chosen is None:
                break
            request = waiting.pop(0)
            work[chosen].add(request, sizes[request], 1, now)
            free[chosen] = max(free[chosen], now) + sizes[request]
            heapq.heappush(events, (free[chosen], 1, request, chosen))
    return latencies


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]

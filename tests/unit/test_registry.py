from __future__ import annotations

import time

import pytest

from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.durations import DurationStats, DurationStatsByKey
from glm_image.lifecycle.lru import LatestEntries
from glm_image.lifecycle.registry import MAX_REMEMBERED, RequestRegistry, RequestState
from glm_image.request.stages import Stage


@pytest.fixture
def registry() -> RequestRegistry:
    return RequestRegistry(RequestState.FORWARDED, lambda key, event: None)


def started(registry: RequestRegistry, request_id: str) -> RequestContext:
    context = RequestContext(id=request_id, observers=(registry,))
    context.start(Stage.AR_QUEUE)
    return context


def test_cancel_applies_to_all_earlier_requests_of_an_id(registry: RequestRegistry) -> None:
    shared, other = [started(registry, "a"), started(registry, "a")], started(registry, "b")
    requested_ns = time.monotonic_ns()
    later = started(registry, "a")
    assert [event["cancelled_now"] for event in registry.cancel("a", requested_ns)] == [True, True]
    assert [context.cancelled for context in (*shared, other, later)] == [True, True, False, False]
    assert [event["cancelled_now"] for event in registry.cancel("a", requested_ns)] == [False, False]


def test_a_linked_request_is_cancelled_with_its_id_and_not_listed(registry: RequestRegistry) -> None:
    mine, over, later = (RequestContext(id="a") for _ in range(3))
    unlinks = [registry.link(context) for context in (mine, over)]
    unlinks[1]()
    later.arrived_ns = time.monotonic_ns() + 10**9
    unlinks.append(registry.link(later))
    assert registry.cancel("a", time.monotonic_ns()) == registry.status("a") == []
    assert [context.cancelled for context in (mine, over, later)] == [True, False, False]
    unlinks[0]()
    unlinks[2]()
    assert registry._linked == {}


def test_abandoned_requests_are_cancelled(registry: RequestRegistry) -> None:
    abandoned, connected = started(registry, ""), started(registry, "")
    abandoned.is_abandoned = lambda: True
    registry.cancel_abandoned()
    assert (abandoned.cancelled, connected.cancelled) == (True, False)


def test_memory_of_ended_requests_is_bounded(registry: RequestRegistry) -> None:
    for number in range(MAX_REMEMBERED + 10):
        started(registry, str(number)).finish()
        registry.cancel(f"x{number}", 1)
    assert registry.status("0") == []
    assert registry.status("20")[0]["state"] == "forwarded"
    assert (len(registry._ended), len(registry._cancels)) == (MAX_REMEMBERED, MAX_REMEMBERED)
    assert registry._requests == {}


def test_a_request_that_never_started_leaves_no_trace(registry: RequestRegistry) -> None:
    RequestContext(id="a", observers=(registry,)).finish(ValueError())
    assert registry.status("a") == []


def test_entries_go_by_number_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("glm_image.lifecycle.lru.time.monotonic", lambda: clock[0])
    entries: LatestEntries[str, int] = LatestEntries(2, max_seconds=10)
    for number, key in enumerate("abab"):
        entries.put(key, number)
    entries.put("c", 4)
    assert [entries.get(key) for key in "abc"] == [None, 3, 4]
    clock[0] = 10.5
    entries.put("d", 5)
    assert [entries.get(key) for key in "bcd"] == [None, None, 5]


def test_duration_stats_follow_the_latest_durations() -> None:
    stats = DurationStats()
    assert (stats.fastest, stats.mean) == (0, 0)
    stats.add(1.0)
    for _ in range(300):
        stats.add(3.0)
    assert (stats.fastest, stats.mean) == (3.0, 3.0)


def test_each_kind_has_its_durations_and_few_kinds_are_kept() -> None:
    stats = DurationStatsByKey()
    for kind in range(1000):
        stats.of(kind).add(kind)
        assert stats.of(0).fastest == 0
    assert stats.of(999).mean == 999
    assert stats.of(1).mean == 0

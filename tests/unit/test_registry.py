from __future__ import annotations

import time

import pytest

from glm_image.errors import CancelledError, DeadlineExceededError
from glm_image.lifecycle.context import RequestContext, Timeouts
from glm_image.lifecycle.eta import DurationStats, DurationStatsByKey
from glm_image.lifecycle.registry import MAX_REMEMBERED, RequestRegistry


def test_all_requests_of_an_id_that_were_there_are_cancelled() -> None:
    in_flight = RequestRegistry("ar_queue", "handed_on")
    shared, other = [RequestContext(id="a"), RequestContext(id="a")], RequestContext(id="b")
    for context in (*shared, other):
        in_flight.begin(context)
    asked_ns = time.monotonic_ns()
    later = RequestContext(id="a")
    in_flight.begin(later)
    assert [told["cancelled_now"] for told in in_flight.cancel("a", asked_ns)] == [True, True]
    assert [context.cancelled for context in (*shared, other, later)] == [True, True, False, False]
    assert [told["cancelled_now"] for told in in_flight.cancel("a", asked_ns)] == [False, False]


def test_what_is_done_beside_a_request_is_cancelled_with_it_and_not_told_of() -> None:
    in_flight = RequestRegistry("condition", "finished")
    mine, over, later = (RequestContext(id="a") for _ in range(3))
    lets_go = [in_flight.beside(context) for context in (mine, over)]
    lets_go[1]()
    later.arrived_ns = time.monotonic_ns() + 10**9
    lets_go.append(in_flight.beside(later))
    assert in_flight.cancel("a", time.monotonic_ns()) == in_flight.status("a") == []
    assert [context.cancelled for context in (mine, over, later)] == [True, False, False]
    lets_go[0]()
    lets_go[2]()
    assert in_flight._beside == {}


def test_callers_that_are_gone_are_cancelled() -> None:
    in_flight = RequestRegistry("ar_queue", "handed_on")
    gone, there = RequestContext(), RequestContext()
    in_flight.begin(gone, lambda: True)
    in_flight.begin(there, lambda: False)
    in_flight.cancel_gone()
    assert (gone.cancelled, there.cancelled) == (True, False)


def test_what_is_remembered_is_bounded() -> None:
    in_flight = RequestRegistry("ar_queue", "handed_on")
    for number in range(MAX_REMEMBERED + 10):
        context = RequestContext(id=str(number))
        in_flight.begin(context)
        in_flight.end(context, None)
        in_flight.cancel(f"x{number}", 1)
    assert in_flight.status("0") == []
    assert in_flight.status("20")[0]["state"] == "handed_on"
    assert (len(in_flight._ended), len(in_flight._cancels)) == (MAX_REMEMBERED, MAX_REMEMBERED)
    assert in_flight._entries == {}


def test_a_job_calls_who_wants_to_know_of_its_cancel() -> None:
    context, called = RequestContext(), list[str]()
    context.on_cancel(lambda: called.append("first"))
    context.cancel()
    context.on_cancel(lambda: called.append("too late"))
    assert called == ["first", "too late"]
    with pytest.raises(CancelledError):
        context.check()


def test_a_deadline_that_cannot_be_met_is_told_by_how_much() -> None:
    context = RequestContext.with_timeout("mine", 2_000_000)
    context.check(1.0)
    with pytest.raises(
        DeadlineExceededError, match=r"at least 5\.000 s, and it has (1\.9|2\.0)\d+ s, 3\.0\d+ s too little$"
    ):
        context.check(5.0)
    RequestContext().check(1e9)


@pytest.mark.parametrize(
    ("default", "most", "asked", "given"),
    [(0, 0, 0, 0), (0, 0, 7, 7), (5, 0, 0, 5), (5, 0, 7, 7), (0, 9, 0, 9), (5, 9, 0, 5), (5, 9, 11, 9), (5, 9, 7, 7)],
)
def test_a_timeout_has_a_default_and_a_maximum(default: int, most: int, asked: int, given: int) -> None:
    assert Timeouts(default, most).of(asked) == given


def test_a_pace_follows_the_latest_times() -> None:
    pace = DurationStats()
    assert (pace.fastest, pace.mean) == (0, 0)
    pace.add(1.0)
    for _ in range(300):
        pace.add(3.0)
    assert (pace.fastest, pace.mean) == (3.0, 3.0)


def test_each_kind_has_its_pace_and_few_are_kept() -> None:
    paces = DurationStatsByKey()
    for kind in range(1000):
        paces.of(kind).add(kind)
        assert paces.of(0).fastest == 0
    assert paces.of(999).mean == 999
    assert paces.of(1).mean == 0

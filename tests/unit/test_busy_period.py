"""The earliest arrival of requests that come straight to the DiT."""

from __future__ import annotations

import pytest

from glm_image.lifecycle.busy_period import IDLE_NS, BusyPeriod
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.stages import Stage

START_NS = 10 * IDLE_NS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [START_NS]
    monkeypatch.setattr("glm_image.lifecycle.busy_period.time.monotonic_ns", lambda: now[0])
    return now


def test_requests_without_a_pause_share_the_arrival_of_the_first(clock: list[int]) -> None:
    busy = BusyPeriod()
    for _ in range(3):
        busy.begin()
        clock[0] += 20 * IDLE_NS
        busy.end()
        clock[0] += IDLE_NS
    assert busy.since_ns == START_NS
    clock[0] += 1
    busy.begin()
    assert busy.since_ns == clock[0]


def test_cancel_applies_to_a_request_that_waited_in_the_queue_and_not_to_a_later_one(clock: list[int]) -> None:
    busy, registry = BusyPeriod(), RequestRegistry(RequestState.FINISHED, lambda key, event: None)
    busy.begin()
    registry.cancel("waits", clock[0] + 1)
    busy.end()
    busy.begin()
    waited = RequestContext(id="waits", arrived_ns=busy.since_ns, observers=(registry,))
    registry.started(waited)
    assert waited.cancelled
    busy.end()
    clock[0] += IDLE_NS + 1
    busy.begin()
    later = RequestContext(id="waits", arrived_ns=busy.since_ns, observers=(registry,))
    later.start(Stage.CONDITION)
    assert not later.cancelled

"""The admission policies against a simulated DiT, and the DiT load that they know."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_image.ar.admission import CHEAP, NEARLY_USED_UP, PATIENCE, BatchAdmission, ImmediateAdmission, QueueSnapshot
from glm_image.ipc.protocol import Event
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.downstream import HAND_OVER_SECONDS, TOPIC, DitLoad, DitLoadReporter

SLOTS = 4
DECODE, PAINT = 8.0, 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def statement(*left: tuple[int, int], painter: str = "glm_dit_0", seconds: float = PAINT) -> Event:
    return {"painter": painter, "requests": list(left), "seconds_a_picture": seconds}


def queue(clock: Clock, **other: float) -> QueueSnapshot:
    values = {
        "now": clock.now, "waiting": 1, "free": SLOTS, "running": 0, "extends": 1.0, "has_begun": False,
        "latest": math.inf, "deadline": math.inf, "decode_seconds": DECODE,
    }  # fmt: skip
    return QueueSnapshot(**(values | other))  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backlog(clock: Clock) -> DitLoad:
    made = DitLoad(clock)
    made.hear(statement())
    return made


def test_immediate_admission_admits_every_sequence(clock: Clock) -> None:
    assert ImmediateAdmission().wait(queue(clock, running=3, free=1)) == 0


def test_sequences_are_admitted_while_the_dit_is_unknown(clock: Clock) -> None:
    backlog = DitLoad(clock)
    for arrived_ns in range(5):
        backlog.hand_on(arrived_ns, 1)
    assert backlog.pictures() is None
    assert BatchAdmission(backlog).wait(queue(clock)) == 0
    backlog.hear(statement((0, 1), seconds=0.0))
    assert backlog.pictures() == 5
    assert BatchAdmission(backlog).wait(queue(clock)) == 0


def test_batch_admission_conditions(clock: Clock, backlog: DitLoad) -> None:
    policy = BatchAdmission(backlog)
    backlog.hear(statement((1, NEARLY_USED_UP)))
    assert policy.wait(queue(clock)) == 0
    assert policy.wait(queue(clock, running=1, free=3)) > 0
    backlog.hear(statement((1, NEARLY_USED_UP + 1)))
    assert policy.wait(queue(clock)) > 0
    assert policy.wait(queue(clock, waiting=SLOTS - 1)) > 0
    assert policy.wait(queue(clock, waiting=SLOTS)) == 0
    assert policy.wait(queue(clock, waiting=SLOTS, running=1, free=3)) > 0
    assert policy.wait(queue(clock, running=1, free=3, extends=CHEAP - 0.01)) == 0
    assert policy.wait(queue(clock, running=1, free=3, extends=CHEAP)) > 0
    assert policy.wait(queue(clock, has_begun=True)) == 0


def test_deadline_and_max_wait_end_the_wait(clock: Clock, backlog: DitLoad, caplog: pytest.LogCaptureFixture) -> None:
    policy = BatchAdmission(backlog)
    backlog.hear(statement((1, 3)))
    longest = policy.max_wait(2, DECODE)
    assert longest == PATIENCE * (DECODE + 5 * PAINT)
    assert policy.wait(queue(clock, latest=clock.now + longest)) == pytest.approx(longest)
    needed = PATIENCE * (DECODE + 4 * PAINT)
    assert policy.wait(queue(clock, deadline=clock.now + needed + 7)) == pytest.approx(7)
    assert policy.wait(queue(clock, deadline=clock.now + needed - 1)) == 0
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert [policy.wait(queue(clock, latest=clock.now)) for _ in range(3)] == [0, 0, 0]
    assert [record.message.partition(" and ")[0] for record in caplog.records] == ["glm_dit has 3 images to denoise"]


def test_what_is_handed_on_is_painted_or_lost(clock: Clock, backlog: DitLoad) -> None:
    backlog.hear(statement((9, 1)))
    for arrived_ns, pictures in ((1, 1), (2, 4)):  # of one batch
        backlog.hand_on(arrived_ns, pictures)
    assert backlog.pictures() == 6
    backlog.hear(statement((2, 4)))  # the later one came out first
    assert backlog.pictures() == 5
    clock.now += 50
    backlog.hand_on(3, 1)
    backlog.hear(statement((2, 1)))
    assert backlog.pictures() == 3
    backlog.hear(statement((3, 1)))  # nothing was heard of the first, which was before it in the queue
    assert backlog.pictures() == 1


def test_nothing_waits_for_a_painter_that_has_nothing_to_do(clock: Clock, backlog: DitLoad) -> None:
    heard = []
    backlog.when_changed(lambda: heard.append(backlog.pictures()))
    clock.now += 50
    backlog.hand_on(1, 5)  # for a caller who wanted the tokens alone
    assert backlog.pictures() == 5
    policy = BatchAdmission(backlog)
    assert policy.wait(queue(clock)) == pytest.approx(HAND_OVER_SECONDS)
    clock.now += HAND_OVER_SECONDS
    assert policy.wait(queue(clock)) == 0
    assert backlog.pictures() == 0
    backlog.hear(statement((7, 2), painter="glm_dit_1"))  # called without the first stage
    assert heard == [2]
    assert backlog.seconds_a_picture == PAINT / 2
    backlog.hear(statement((8, 1)))
    clock.now += 50
    backlog.hand_on(2, 1)
    clock.now += 50
    assert backlog.pictures() == 4
    assert backlog.next_loss() == math.inf


def test_a_painter_states_what_is_left() -> None:
    told: list[Event] = []
    painting = DitLoadReporter("glm_dit_3")
    painting.publish = lambda topic, event: told.append({**event(), "topic": topic})
    seen: list[str] = []
    one, other = (
        RequestContext(arrived_ns=5, on_stage_seconds=lambda stage, _: seen.append(stage)),
        RequestContext(arrived_ns=6),
    )
    painting.begin(one, 2)
    with one.timed("condition"):
        pass
    one.add_seconds("denoise", 3.0)
    painting.begin(other, 1)
    one.add_seconds("denoise", 5.0)
    painting.end(one)
    painting.end(other)
    painting.end(other)
    assert [event["requests"] for event in told] == [
        [(5, 2)], [(5, 1)], [(5, 1), (6, 1)], [(5, 0), (6, 1)], [(6, 1)], [], [],
    ]  # fmt: skip
    assert told[-1]["seconds_a_picture"] == 4.0
    assert {(event["painter"], event["topic"]) for event in told} == {("glm_dit_3", TOPIC)}
    assert seen == ["condition", "denoise", "denoise"]


@dataclass
class Stages:
    """Both stages, simulated: a sequence takes DECODE seconds, whatever else decodes; an image takes PAINT.

    Args:
        loses: whether the n-th report is lost.
        paints: whether the n-th request is forwarded to the DiT.
    """

    loses: Callable[[int], bool] = lambda _: False
    paints: Callable[[int], bool] = lambda _: True
    clock: Clock = field(default_factory=Clock)
    waiting: deque[int] = field(default_factory=deque)
    running: dict[int, float] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    painting: int | None = None
    admitted: list[tuple[float, int]] = field(default_factory=list)
    arrived: dict[int, float] = field(default_factory=dict)
    painted: list[float] = field(default_factory=list)
    batch_seconds: float = 0.0
    idle_with_work: float = 0.0

    def __post_init__(self) -> None:
        self.backlog = DitLoad(self.clock)
        self.backlog.hear(statement())
        self.policy = BatchAdmission(self.backlog)
        self.latest: dict[int, float] = {}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order, self.statements = itertools.count(), itertools.count()

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), call))

    def arrive(self, number: int) -> None:
        self.arrived[number] = self.clock.now
        self.waiting.append(number)

    def wait(self) -> float:
        if not self.waiting or len(self.running) == SLOTS:
            return math.inf
        first, now = self.waiting[0], self.clock.now
        longest = max(self.running.values(), default=now) - now
        if first not in self.latest:
            self.latest[first] = now + self.policy.max_wait(len(self.running), DECODE)
        return self.policy.wait(
            queue(
                self.clock,
                waiting=len(self.waiting),
                free=SLOTS - len(self.running),
                running=len(self.running),
                extends=1 - longest / DECODE,
                latest=self.latest[first],
            )
        )

    def state(self) -> None:
        if not self.loses(next(self.statements)):
            self.backlog.hear(statement(*([] if self.painting is None else [(self.painting, 1)])))

    def decoded(self, number: int) -> None:
        del self.running[number]
        self.backlog.hand_on(number, 1)
        if self.paints(number):
            self.queue.append(number)
            self.paint()

    def paint(self) -> None:
        if self.painting is None and self.queue:
            self.painting = self.queue.popleft()
            self.state()
            self.at(self.clock.now + PAINT, self.finish)

    def finish(self) -> None:
        self.painted.append(self.clock.now)
        self.painting = None
        self.state()
        self.paint()

    def run(self) -> None:
        while True:
            while (seconds := self.wait()) == 0:
                number = self.waiting.popleft()
                self.admitted.append((self.clock.now, number))
                self.running[number] = self.clock.now + DECODE
                self.at(self.clock.now + DECODE, lambda number=number: self.decoded(number))  # type: ignore[misc]
            wake = self.clock.now + seconds
            following = min(self.events[0][0] if self.events else math.inf, wake)
            if following == math.inf:
                return
            self.batch_seconds += (following - self.clock.now) * bool(self.running)
            if self.waiting and not self.running and self.painting is None:
                self.idle_with_work += following - self.clock.now
            self.clock.now = max(following, math.nextafter(self.clock.now, math.inf))
            if self.events and self.events[0][0] <= self.clock.now:
                heapq.heappop(self.events)[2]()


GAPS = st.lists(st.floats(0, 30), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(gaps=GAPS, lost=st.sets(st.integers(0, 100)), unpainted=st.sets(st.integers(0, 40)))
def test_requests_are_admitted_in_order_whatever_is_lost(
    gaps: list[float], lost: set[int], unpainted: set[int]
) -> None:
    stages = Stages(lost.__contains__, lambda number: number not in unpainted)
    for number, when in enumerate(itertools.accumulate(gaps)):
        stages.at(100 + when, lambda number=number: stages.arrive(number))  # type: ignore[misc]
    stages.run()
    assert [number for _, number in stages.admitted] == list(range(len(gaps)))
    # The first in the queue waits at most until all images before it are denoised, times PATIENCE.
    for (when, _), (following, number) in itertools.pairwise(stages.admitted):
        came = max(when, stages.arrived[number])
        assert following - came <= DECODE + PATIENCE * (DECODE + (len(gaps) + SLOTS) * PAINT)


@settings(max_examples=100, deadline=None)
@given(gaps=GAPS)
def test_device_never_idles_while_a_request_waits(gaps: list[float]) -> None:
    stages = Stages()
    for number, when in enumerate(itertools.accumulate(gaps)):
        stages.at(100 + when, lambda number=number: stages.arrive(number))  # type: ignore[misc]
    stages.run()
    assert len(stages.painted) == len(gaps)
    assert stages.idle_with_work == 0


@pytest.mark.parametrize("in_flight", [SLOTS + 1, 2 * SLOTS, 3 * SLOTS])
def test_closed_loop_load_decodes_in_batches(in_flight: int) -> None:
    stages, total, numbers = Stages(), 30 * SLOTS, itertools.count()

    def ask() -> None:
        if (number := next(numbers)) < total:
            stages.arrive(number)

    finish = stages.finish

    def finish_and_ask() -> None:
        finish()
        ask()

    stages.finish = finish_and_ask  # type: ignore[method-assign]
    for _ in range(in_flight):
        ask()
    stages.run()
    assert len(stages.painted) == total
    # Immediate admission would take DECODE for each; the last ones do not fill a batch.
    assert stages.batch_seconds <= (total / SLOTS + 2) * DECODE

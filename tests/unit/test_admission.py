"""The policies of admission against a second stage that paints by the clock, and what is known of its work."""

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
from glm_image.lifecycle.context import RequestContext, RequestObserver
from glm_image.lifecycle.downstream import HANDOVER_SECONDS, TOPIC, DitLoad, DitLoadReporter
from glm_image.request.stages import Stage

SLOTS = 4
DECODE, PAINT = 8.0, 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def statement(*left: tuple[int, int], instance: str = "glm_dit_0", seconds: float = PAINT) -> Event:
    return {"instance": instance, "requests": list(left), "seconds_per_image": seconds}


def line(clock: Clock, **other: float) -> QueueSnapshot:
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
    made.update(statement())
    return made


def test_at_once_lets_everybody_in(clock: Clock) -> None:
    assert ImmediateAdmission().wait(line(clock, running=3, free=1)) == 0


def test_nobody_waits_while_the_painters_are_not_known(clock: Clock) -> None:
    backlog = DitLoad(clock)
    for arrived_ns in range(5):
        backlog.forwarded(arrived_ns, 1)
    assert backlog.pictures() is None
    assert BatchAdmission(backlog).wait(line(clock)) == 0
    backlog.update(statement((0, 1), seconds=0.0))
    assert backlog.pictures() == 5
    assert BatchAdmission(backlog).wait(line(clock)) == 0


def test_who_is_let_in(clock: Clock, backlog: DitLoad) -> None:
    gathered = BatchAdmission(backlog)
    backlog.update(statement((1, NEARLY_USED_UP)))
    assert gathered.wait(line(clock)) == 0
    assert gathered.wait(line(clock, running=1, free=3)) > 0
    backlog.update(statement((1, NEARLY_USED_UP + 1)))
    assert gathered.wait(line(clock)) > 0
    assert gathered.wait(line(clock, waiting=SLOTS - 1)) > 0
    assert gathered.wait(line(clock, waiting=SLOTS)) == 0
    assert gathered.wait(line(clock, waiting=SLOTS, running=1, free=3)) > 0
    assert gathered.wait(line(clock, running=1, free=3, extends=CHEAP - 0.01)) == 0
    assert gathered.wait(line(clock, running=1, free=3, extends=CHEAP)) > 0
    assert gathered.wait(line(clock, has_begun=True)) == 0


def test_time_is_a_reason_too(clock: Clock, backlog: DitLoad, caplog: pytest.LogCaptureFixture) -> None:
    gathered = BatchAdmission(backlog)
    backlog.update(statement((1, 3)))
    longest = gathered.max_wait(2, DECODE)
    assert longest == PATIENCE * (DECODE + 5 * PAINT)
    assert gathered.wait(line(clock, latest=clock.now + longest)) == pytest.approx(longest)
    needed = PATIENCE * (DECODE + 4 * PAINT)
    assert gathered.wait(line(clock, deadline=clock.now + needed + 7)) == pytest.approx(7)
    assert gathered.wait(line(clock, deadline=clock.now + needed - 1)) == 0
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert [gathered.wait(line(clock, latest=clock.now)) for _ in range(3)] == [0, 0, 0]
    assert [record.message.partition(" and ")[0] for record in caplog.records] == ["glm_dit has 3 pictures to paint"]


def test_what_is_handed_on_is_painted_or_lost(clock: Clock, backlog: DitLoad) -> None:
    backlog.update(statement((9, 1)))
    for arrived_ns, pictures in ((1, 1), (2, 4)):  # of one batch
        backlog.forwarded(arrived_ns, pictures)
    assert backlog.pictures() == 6
    backlog.update(statement((2, 4)))  # the later one came out first
    assert backlog.pictures() == 5
    clock.now += 50
    backlog.forwarded(3, 1)
    backlog.update(statement((2, 1)))
    assert backlog.pictures() == 3
    backlog.update(statement((3, 1)))  # nothing was heard of the first, which was before it in the queue
    assert backlog.pictures() == 1


def test_nothing_waits_for_a_painter_that_has_nothing_to_do(clock: Clock, backlog: DitLoad) -> None:
    heard = []
    backlog.when_changed(lambda: heard.append(backlog.pictures()))
    clock.now += 50
    backlog.forwarded(1, 5)  # for a caller who wanted the tokens alone
    assert backlog.pictures() == 5
    gathered = BatchAdmission(backlog)
    assert gathered.wait(line(clock)) == pytest.approx(HANDOVER_SECONDS)
    clock.now += HANDOVER_SECONDS
    assert gathered.wait(line(clock)) == 0
    assert backlog.pictures() == 0
    backlog.update(statement((7, 2), instance="glm_dit_1"))  # called without the first stage
    assert heard == [2]
    assert backlog.seconds_a_picture == PAINT / 2
    backlog.update(statement((8, 1)))
    clock.now += 50
    backlog.forwarded(2, 1)
    clock.now += 50
    assert backlog.pictures() == 4
    assert backlog.next_loss() == math.inf


class StagesSeen(RequestObserver):
    """Notes the stages of which parts have finished."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage_finished(self, context: RequestContext, stage: Stage, seconds: float) -> None:
        self.stages.append(stage)


@pytest.mark.parametrize("is_first", [True, False])
def test_reporter_publishes_the_images_that_are_left(is_first: bool) -> None:
    published: list[Event] = []
    reporter, seen = DitLoadReporter("glm_dit_3"), StagesSeen()
    reporter.publish = lambda topic, event: published.append({**event(), "topic": topic})
    observers = (reporter, seen) if is_first else (seen, reporter)
    first, second = (
        RequestContext(arrived_ns=5, num_images=2, observers=observers),
        RequestContext(arrived_ns=6, observers=observers),
    )
    first.start(Stage.CONDITION)
    with first.timed(Stage.CONDITION):
        pass
    first.add_seconds(Stage.DENOISE, 3.0)
    second.start(Stage.CONDITION)
    first.add_seconds(Stage.DENOISE, 5.0)
    first.finish()
    second.finish()
    reporter.finished(second, None)
    assert [event["requests"] for event in published] == [
        [(5, 2)], [(5, 1)], [(5, 1), (6, 1)], [(5, 0), (6, 1)], [(6, 1)], [], [],
    ]  # fmt: skip
    assert published[-1]["seconds_per_image"] == 4.0
    assert {(event["instance"], event["topic"]) for event in published} == {("glm_dit_3", TOPIC)}
    assert seen.stages == [Stage.CONDITION, Stage.DENOISE, Stage.DENOISE]


@dataclass
class Stages:
    """Both stages by the clock: a sequence takes DECODE seconds whoever decodes beside it, a picture PAINT.

    Args:
        loses: whether the n-th statement is lost.
        paints: whether the n-th request is handed on to the painter.
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
        self.backlog.update(statement())
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
            line(
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
            self.backlog.update(statement(*([] if self.painting is None else [(self.painting, 1)])))

    def decoded(self, number: int) -> None:
        del self.running[number]
        self.backlog.forwarded(number, 1)
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
def test_everybody_is_let_in_in_order_whatever_is_lost(gaps: list[float], lost: set[int], unpainted: set[int]) -> None:
    stages = Stages(lost.__contains__, lambda number: number not in unpainted)
    for number, when in enumerate(itertools.accumulate(gaps)):
        stages.at(100 + when, lambda number=number: stages.arrive(number))  # type: ignore[misc]
    stages.run()
    assert [number for _, number in stages.admitted] == list(range(len(gaps)))
    # Of a head of the line: all before it painted, and patience; nobody waits longer than the heads before it together.
    for (when, _), (following, number) in itertools.pairwise(stages.admitted):
        came = max(when, stages.arrived[number])
        assert following - came <= DECODE + PATIENCE * (DECODE + (len(gaps) + SLOTS) * PAINT)


@settings(max_examples=100, deadline=None)
@given(gaps=GAPS)
def test_the_device_never_idles_while_anybody_waits(gaps: list[float]) -> None:
    stages = Stages()
    for number, when in enumerate(itertools.accumulate(gaps)):
        stages.at(100 + when, lambda number=number: stages.arrive(number))  # type: ignore[misc]
    stages.run()
    assert len(stages.painted) == len(gaps)
    assert stages.idle_with_work == 0


@pytest.mark.parametrize("in_flight", [SLOTS + 1, 2 * SLOTS, 3 * SLOTS])
def test_a_steady_stream_decodes_in_batches(in_flight: int) -> None:
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
    # At once it would be DECODE for each; the last ones are fewer than a batch.
    assert stages.batch_seconds <= (total / SLOTS + 2) * DECODE

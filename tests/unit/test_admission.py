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
from glm_image.lifecycle.context import RequestContext, RequestObserver
from glm_image.lifecycle.dit_load import HANDOVER_SECONDS, TOPIC, DitLoad, DitLoadReporter
from glm_image.request.stages import Stage

SLOTS = 4
DECODE, DENOISE = 8.0, 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def dit_report(*left: tuple[int, int], instance: str = "glm_dit_0", seconds: float = DENOISE) -> Event:
    return {"instance": instance, "requests": list(left), "seconds_per_image": seconds}


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
def dit_load(clock: Clock) -> DitLoad:
    made = DitLoad(clock)
    made.update(dit_report())
    return made


def test_immediate_admission_admits_every_sequence(clock: Clock) -> None:
    assert ImmediateAdmission().wait(queue(clock, running=3, free=1)) == 0


def test_sequences_are_admitted_while_the_dit_is_unknown(clock: Clock) -> None:
    dit_load = DitLoad(clock)
    for arrived_ns in range(5):
        dit_load.forwarded(arrived_ns, 1)
    assert dit_load.images() is None
    assert BatchAdmission(dit_load).wait(queue(clock)) == 0
    dit_load.update(dit_report((0, 1), seconds=0.0))
    assert dit_load.images() == 5
    assert BatchAdmission(dit_load).wait(queue(clock)) == 0


def test_batch_admission_conditions(clock: Clock, dit_load: DitLoad) -> None:
    policy = BatchAdmission(dit_load)
    dit_load.update(dit_report((1, NEARLY_USED_UP)))
    assert policy.wait(queue(clock)) == 0
    assert policy.wait(queue(clock, running=1, free=3)) > 0
    dit_load.update(dit_report((1, NEARLY_USED_UP + 1)))
    assert policy.wait(queue(clock)) > 0
    assert policy.wait(queue(clock, waiting=SLOTS - 1)) > 0
    assert policy.wait(queue(clock, waiting=SLOTS)) == 0
    assert policy.wait(queue(clock, waiting=SLOTS, running=1, free=3)) > 0
    assert policy.wait(queue(clock, running=1, free=3, extends=CHEAP - 0.01)) == 0
    assert policy.wait(queue(clock, running=1, free=3, extends=CHEAP)) > 0
    assert policy.wait(queue(clock, has_begun=True)) == 0


def test_deadline_and_max_wait_end_the_wait(clock: Clock, dit_load: DitLoad, caplog: pytest.LogCaptureFixture) -> None:
    policy = BatchAdmission(dit_load)
    dit_load.update(dit_report((1, 3)))
    longest = policy.max_wait(2, DECODE)
    assert longest == PATIENCE * (DECODE + 5 * DENOISE)
    assert policy.wait(queue(clock, latest=clock.now + longest)) == pytest.approx(longest)
    needed = PATIENCE * (DECODE + 4 * DENOISE)
    assert policy.wait(queue(clock, deadline=clock.now + needed + 7)) == pytest.approx(7)
    assert policy.wait(queue(clock, deadline=clock.now + needed - 1)) == 0
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert [policy.wait(queue(clock, latest=clock.now)) for _ in range(3)] == [0, 0, 0]
    assert [record.message.partition(" and ")[0] for record in caplog.records] == ["glm_dit has 3 images to denoise"]


def test_forwarded_images_are_denoised_or_lost(clock: Clock, dit_load: DitLoad) -> None:
    dit_load.update(dit_report((9, 1)))
    for arrived_ns, images in ((1, 1), (2, 4)):  # of one batch
        dit_load.forwarded(arrived_ns, images)
    assert dit_load.images() == 6
    dit_load.update(dit_report((2, 4)))  # the later one came out first
    assert dit_load.images() == 5
    clock.now += 50
    dit_load.forwarded(3, 1)
    dit_load.update(dit_report((2, 1)))
    assert dit_load.images() == 3
    dit_load.update(dit_report((3, 1)))  # the first one was before it in the queue, so it is lost
    assert dit_load.images() == 1


def test_bytes_of_forwarded_requests_count_until_they_are_received_or_lost(clock: Clock, dit_load: DitLoad) -> None:
    dit_load.update(dit_report((9, 1)))
    dit_load.forwarded(1, 1, size=70)
    dit_load.forwarded(2, 1, size=30)
    clock.now += 50
    assert dit_load.bytes() == 100
    dit_load.update(dit_report((1, 1)))
    assert dit_load.bytes() == 30
    dit_load.update(dit_report())
    clock.now += HANDOVER_SECONDS
    assert dit_load.bytes() == 0
    alone = DitLoad(clock)
    for number in range(3):
        alone.forwarded(number, 1, size=10)
        clock.now += HANDOVER_SECONDS
    assert alone.bytes() == 0
    assert not alone._forwarded, "nothing is kept where there is no DiT"


def test_forwarded_images_are_lost_while_the_dit_is_idle(clock: Clock, dit_load: DitLoad) -> None:
    changes = []
    dit_load.when_changed(lambda: changes.append(dit_load.images()))
    clock.now += 50
    dit_load.forwarded(1, 5)  # for a caller that needs only the tokens
    assert dit_load.images() == 5
    policy = BatchAdmission(dit_load)
    assert policy.wait(queue(clock)) == pytest.approx(HANDOVER_SECONDS)
    clock.now += HANDOVER_SECONDS
    assert policy.wait(queue(clock)) == 0
    assert dit_load.images() == 0
    dit_load.update(dit_report((7, 2), instance="glm_dit_1"))  # called without the AR
    assert changes == [2]
    assert dit_load.seconds_per_image == DENOISE / 2
    dit_load.update(dit_report((8, 1)))
    clock.now += 50
    dit_load.forwarded(2, 1)
    clock.now += 50
    assert dit_load.images() == 4
    assert dit_load.next_loss() == math.inf


class StagesSeen(RequestObserver):
    """Notes the stages of which parts have finished."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage_finished(self, context: RequestContext, stage: Stage, seconds: float) -> None:
        self.stages.append(stage)


@pytest.mark.parametrize("is_first", [True, False])
def test_reporter_publishes_the_images_that_are_left(is_first: bool) -> None:
    published: list[Event] = []
    reporter = DitLoadReporter("glm_dit_3", lambda topic, event: published.append({**event(), "topic": topic}))
    seen = StagesSeen()
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
    """Both stages, simulated: a sequence takes DECODE seconds, whatever else decodes; an image takes DENOISE.

    Args:
        loses: whether the n-th report is lost.
        denoises: whether the n-th request is forwarded to the DiT.
    """

    loses: Callable[[int], bool] = lambda _: False
    denoises: Callable[[int], bool] = lambda _: True
    clock: Clock = field(default_factory=Clock)
    waiting: deque[int] = field(default_factory=deque)
    running: dict[int, float] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    denoising: int | None = None
    admitted: list[tuple[float, int]] = field(default_factory=list)
    arrived: dict[int, float] = field(default_factory=dict)
    denoised: list[float] = field(default_factory=list)
    batch_seconds: float = 0.0
    idle_with_work: float = 0.0

    def __post_init__(self) -> None:
        self.dit_load = DitLoad(self.clock)
        self.dit_load.update(dit_report())
        self.policy = BatchAdmission(self.dit_load)
        self.latest: dict[int, float] = {}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order, self.reports = itertools.count(), itertools.count()

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

    def report(self) -> None:
        if not self.loses(next(self.reports)):
            self.dit_load.update(dit_report(*([] if self.denoising is None else [(self.denoising, 1)])))

    def decoded(self, number: int) -> None:
        del self.running[number]
        self.dit_load.forwarded(number, 1)
        if self.denoises(number):
            self.queue.append(number)
            self.denoise_next()

    def denoise_next(self) -> None:
        if self.denoising is None and self.queue:
            self.denoising = self.queue.popleft()
            self.report()
            self.at(self.clock.now + DENOISE, self.finish)

    def finish(self) -> None:
        self.denoised.append(self.clock.now)
        self.denoising = None
        self.report()
        self.denoise_next()

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
            if self.waiting and not self.running and self.denoising is None:
                self.idle_with_work += following - self.clock.now
            self.clock.now = max(following, math.nextafter(self.clock.now, math.inf))
            if self.events and self.events[0][0] <= self.clock.now:
                heapq.heappop(self.events)[2]()


GAPS = st.lists(st.floats(0, 30), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(gaps=GAPS, lost=st.sets(st.integers(0, 100)), not_denoised=st.sets(st.integers(0, 40)))
def test_requests_are_admitted_in_order_whatever_is_lost(
    gaps: list[float], lost: set[int], not_denoised: set[int]
) -> None:
    stages = Stages(lost.__contains__, lambda number: number not in not_denoised)
    for number, when in enumerate(itertools.accumulate(gaps)):
        stages.at(100 + when, lambda number=number: stages.arrive(number))  # type: ignore[misc]
    stages.run()
    assert [number for _, number in stages.admitted] == list(range(len(gaps)))
    # The first in the queue waits at most until all images before it are denoised, times PATIENCE.
    for (when, _), (following, number) in itertools.pairwise(stages.admitted):
        came = max(when, stages.arrived[number])
        assert following - came <= DECODE + PATIENCE * (DECODE + (len(gaps) + SLOTS) * DENOISE)


@settings(max_examples=100, deadline=None)
@given(gaps=GAPS)
def test_device_never_idles_while_a_request_waits(gaps: list[float]) -> None:
    stages = Stages()
    for number, when in enumerate(itertools.accumulate(gaps)):
        stages.at(100 + when, lambda number=number: stages.arrive(number))  # type: ignore[misc]
    stages.run()
    assert len(stages.denoised) == len(gaps)
    assert stages.idle_with_work == 0


@pytest.mark.parametrize("in_flight", [SLOTS + 1, 2 * SLOTS, 3 * SLOTS])
def test_closed_loop_load_decodes_in_batches(in_flight: int) -> None:
    stages, total, numbers = Stages(), 30 * SLOTS, itertools.count()

    def submit() -> None:
        if (number := next(numbers)) < total:
            stages.arrive(number)

    finish = stages.finish

    def finish_and_submit() -> None:
        finish()
        submit()

    stages.finish = finish_and_submit  # type: ignore[method-assign]
    for _ in range(in_flight):
        submit()
    stages.run()
    assert len(stages.denoised) == total
    # Immediate admission would take DECODE for each; the last ones do not fill a batch.
    assert stages.batch_seconds <= (total / SLOTS + 2) * DECODE

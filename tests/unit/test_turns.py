"""Requests take turns at the DiT's device: threads that wait, cancels and deadlines of these, and sources' memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_image.dit.commands import ForgetSources, Prepare, ReadSource, ReserveSources, Step
from glm_image.dit.metrics import QUEUE_SECONDS
from glm_image.dit.scheduler import Scheduler
from glm_image.dit.step_times import StepTimes
from glm_image.dit.turns import Flow, Turns
from glm_image.errors import CancelledError, DeadlineExceededError
from glm_image.lifecycle.context import NANOSECONDS, Progress, ProgressCallback, RequestContext
from glm_image.parallel.commands import Command
from glm_image.request.geometry import Grid
from glm_image.request.source_images import SourcePicture
from glm_image.request.stages import Stage
from unit.test_dit_scheduler import STEPS, WAIT_SECONDS, Executor, request

FINE_QUANTUM = 1e-9
"""Steps without a device take microseconds."""

SIDE = 32
SOURCE = SourcePicture(np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros(1, np.int32), Grid(1, 1))


class Device(Executor):
    """Waits in the first step until it is released; keeps the books of sources."""

    def __init__(self) -> None:
        super().__init__()
        self.holds, self.may_go_on = threading.Event(), threading.Event()
        self.sources: list[int] = []
        self.is_full = False
        self.before = self._hold

    def _hold(self, command: Command[Any]) -> None:
        if isinstance(command, Step) and not self.holds.is_set():
            self.holds.set()
            assert self.may_go_on.wait(WAIT_SECONDS)

    def run(self, command: Command[Any]) -> Any:
        match command:
            case ReserveSources():
                if self.is_full and self.sources:
                    return False
                self.sources.append(command.request)
                return True
            case ForgetSources():
                self.sources = [number for number in self.sources if number != command.request]
                return None
            case ReadSource():
                return self.before(command)
            case _ if hasattr(command, "source"):
                return None
        return super().run(command)

    def seeds(self) -> list[int]:
        return [command.seed for command in self.commands if isinstance(command, Prepare)]


class Requests:
    """Denoises requests in threads, the first of which holds the device until ``release``."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.device, self._pool = Device(), pool
        self.recorded: list[str] = []
        self.scheduler = Scheduler(self.device.run, lambda metric, *_: self.recorded.append(metric.name), FINE_QUANTUM)

    def start(self, *seeds: int, context: RequestContext | None = None, **options: Any) -> Future[list[int]]:
        """Starts a request, and waits until it takes part."""
        joined = len(self.scheduler._turns._flows)
        future = self._pool.submit(self.scheduler.denoise, context or RequestContext(), request(*seeds), **options)
        while len(self.scheduler._turns._flows) == joined and not future.done():
            pass
        if not joined:
            assert self.device.holds.wait(WAIT_SECONDS)
        return future

    def release(self) -> None:
        self.device.may_go_on.set()


@pytest.fixture
def requests() -> Iterator[Requests]:
    with ThreadPoolExecutor(8) as pool:
        made = Requests(pool)
        yield made
        made.release()


def test_images_of_requests_alternate_and_each_is_denoised_without_a_break(requests: Requests) -> None:
    many = requests.start(1, 2, 3, 4)
    one, two = requests.start(11), requests.start(21, 22)
    requests.release()
    for future in (many, one, two):
        future.result(WAIT_SECONDS)
    seeds = requests.device.seeds()
    assert seeds[0] == 1
    assert {seeds[1], seeds[2]} == {11, 21}
    for own in ([1, 2, 3, 4], [21, 22]):
        assert [seed for seed in seeds if seed in own] == own
    images = [command.image for command in requests.device.commands if isinstance(command, (Prepare, Step))]
    assert images == [image for image in dict.fromkeys(images) for _ in range(STEPS + 1)]
    assert requests.recorded.count(QUEUE_SECONDS.name) == 3


def test_request_that_waits_for_its_turn_is_cancelled_immediately(requests: Requests) -> None:
    first, context = requests.start(1), RequestContext()
    waiting = requests.start(2, context=context)
    context.cancel()
    with pytest.raises(CancelledError):
        waiting.result(WAIT_SECONDS)
    assert not first.done()
    requests.release()
    first.result(WAIT_SECONDS)
    assert requests.device.seeds() == [1]


def test_request_that_waits_past_its_deadline_ends(requests: Requests) -> None:
    first = requests.start(1)
    late = requests.start(2, context=RequestContext(deadline_ns=time.monotonic_ns() + NANOSECONDS // 20))
    with pytest.raises(DeadlineExceededError):
        late.result(WAIT_SECONDS)
    assert not first.done()


def test_wait_for_a_turn_is_time_in_the_queue(requests: Requests) -> None:
    seen, context = list[Progress](), RequestContext()
    context.add_observer(ProgressCallback(seen.append))
    first, second = requests.start(1), requests.start(2, context=context)
    assert not seen
    requests.release()
    first.result(WAIT_SECONDS)
    second.result(WAIT_SECONDS)
    assert [progress.stage for progress in seen] == [Stage.CONDITION, *[Stage.DENOISE] * STEPS]
    assert context.seconds[Stage.DIT_QUEUE] > 0
    assert seen[-1].seconds_left == 0


def test_sources_of_all_requests_fit_together_in_order_of_arrival(requests: Requests) -> None:
    """The second request with sources waits for the first; the third waits behind it; one without does not wait."""
    pixels = {"max_source_pixels": 2 * SIDE**2}
    first = requests.start(1, 2, sources=(SOURCE, SOURCE), **pixels)
    second = requests.start(11, sources=(SOURCE,), **pixels)
    third, plain = requests.start(21, sources=(SOURCE,), **pixels), requests.start(31)
    held: list[int] = []
    requests.device.before = lambda command: held.append(len(requests.device.sources))
    requests.release()
    for future in (first, second, third, plain):
        future.result(WAIT_SECONDS)
    seeds = requests.device.seeds()
    assert seeds.index(31) < seeds.index(11)
    assert [seed for seed in seeds if seed != 31] == [1, 2, 11, 21]
    assert not requests.device.sources
    assert max(held) <= 2


def test_sources_that_find_no_memory_wait_until_those_of_others_are_gone(requests: Requests) -> None:
    requests.device.is_full = True
    first = requests.start(1, 2, sources=(SOURCE,))
    second, plain = requests.start(11, sources=(SOURCE,)), requests.start(31)
    requests.release()
    for future in (first, second, plain):
        future.result(WAIT_SECONDS)
    seeds = requests.device.seeds()
    assert seeds.index(11) > seeds.index(2)
    assert not requests.device.sources


def test_cancel_while_sources_are_read_takes_effect_at_the_next_one(requests: Requests) -> None:
    context, read = RequestContext(), list[Command[Any]]()

    def cancel(command: Command[Any]) -> None:
        read.append(command)
        context.cancel()

    requests.device.before = cancel
    with pytest.raises(CancelledError):
        requests.scheduler.denoise(context, request(1), (SOURCE,) * 4)
    assert len(read) == 1
    assert not requests.device.sources


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from(["", "cancel", "fault"]), st.integers(0, 9), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_every_request_ends_and_leaves_nothing(asked: list[tuple[int, str, int, bool]]) -> None:
    """Requests of all kinds at the same time: each is denoised or ends with its own error."""
    device = Device()
    faulty = {100 * number for number, (_, end, _, _) in enumerate(asked) if end == "fault"}
    scheduler = Scheduler(device.run, quantum_seconds=FINE_QUANTUM)

    def fail(command: Command[Any]) -> None:
        if isinstance(command, Prepare) and command.seed in faulty:
            raise RuntimeError("fault")

    def denoise(number: int, images: int, end: str, step: int, with_source: bool) -> str:
        def act(progress: Progress) -> None:
            if progress.done == step and end == "cancel":
                context.cancel()

        context = RequestContext()
        context.add_observer(ProgressCallback(act))
        seeds = range(100 * number, 100 * number + images)
        try:
            found = scheduler.denoise(context, request(*seeds), (SOURCE,) if with_source else (), 1.5 * SIDE**2)
        except (CancelledError, RuntimeError) as error:
            return type(error).__name__
        return "done" if [device.images[image].seed for image in found] == list(seeds) else "wrong"

    device.before = fail
    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(denoise, number, *values) for number, values in enumerate(asked)]
        for future, (images, end, step, _) in zip(ends, asked, strict=True):
            is_cancelled = end == "cancel" and step < images * STEPS
            expected = "RuntimeError" if end == "fault" else "CancelledError" if is_cancelled else "done"
            assert future.result(WAIT_SECONDS) == expected
    assert not device.sources
    assert not scheduler._turns._flows


def test_time_to_the_end_counts_the_share_of_the_others() -> None:
    turns, flows = Turns(), [Flow(images, lambda: 2.0) for images in (8, 1)]
    own = Flow(1, lambda: 5.0)
    with turns.taking_part(own), turns.taking_part(flows[0]), turns.taking_part(flows[1]):
        assert turns.seconds_to_end(own, 5.0) == 5 + 5 + 2
        assert turns.seconds_to_end(flows[0], 16.0) == 16 + 5 + 2
    assert turns.seconds_to_end(own, 5.0) == 5


def test_steps_of_an_unknown_kind_are_estimated_by_their_tokens() -> None:
    times, known = StepTimes(), request(1)
    assert times.image_seconds(known) == 0
    times.add(known, 0.2)
    assert times.image_seconds(known) == pytest.approx(STEPS * 0.2)
    larger = type(known)(**{**vars(known), "grid": Grid(4, 2)})
    assert times.step_seconds(larger) == pytest.approx(0.8)
    assert times.step_seconds(type(known)(**{**vars(known), "guidance_scale": 1.0})) == pytest.approx(0.1)
    assert times.fastest(larger) == 0

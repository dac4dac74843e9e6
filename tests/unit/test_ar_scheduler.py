from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from glm_image.ar.admission import Admission, ImmediateAdmission, QueueSnapshot
from glm_image.ar.commands import Admit, ArCommand, Discard, Peek, Release, Step
from glm_image.ar.scheduler import Scheduler
from glm_image.ar.scheduler_thread import SchedulerThread
from glm_image.ar.sequence import ArResult, Request
from glm_image.errors import CancelledError, DeadlineExceededError, QueueFullError, UnavailableError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext, RequestObserver
from glm_image.request.geometry import Grid
from glm_image.request.parameters import GenerationParameters, ResolvedRequest, Sampling
from glm_image.request.stages import Stage

SLOTS = 3
LENGTH = 10
PREVIEW = 4
WAIT_SECONDS = 30


class Executor:
    """Keeps the books of an executor, and holds it to its contract: token i of a sequence is 1000 * seed + i."""

    def __init__(self) -> None:
        self.commands: list[ArCommand[Any]] = []
        self.before: Callable[[ArCommand[Any]], None] = lambda _: None
        self.fault: Callable[[ArCommand[Any]], bool] = lambda _: False
        self._sequences: dict[int, list[int]] = {}

    def run(self, command: ArCommand[Any]) -> Any:
        self.before(command)
        self.commands.append(command)
        result = self._obey(command)
        if self.fault(command):
            raise RuntimeError(f"fault at {type(command).__name__}")
        return result

    def _obey(self, command: ArCommand[Any]) -> Any:
        match command:
            case Step(count):
                assert count >= 1
                for sequence in self._sequences.values():
                    sequence[1] += count
                    assert sequence[1] <= sequence[2], "a sequence has fewer tokens left"
            case Admit(slot):
                assert 0 <= slot < SLOTS
                assert slot not in self._sequences, "the slot is in use"
                self._sequences[slot] = [command.seed, 1, command.tokens]
            case Peek(slot, count):
                seed, sampled, _ = self._sequences[slot]
                assert count <= sampled, "the tokens are not sampled yet"
                return np.arange(1000 * seed, 1000 * seed + count, dtype=np.int32)
            case Release(slot):
                seed, sampled, _ = self._sequences.pop(slot)
                return np.arange(1000 * seed, 1000 * seed + sampled, dtype=np.int32)
            case Discard(slot):
                self._sequences.pop(slot, None)
        return None

    def seeds(self) -> list[int]:
        return [command.seed for command in self.of(Admit)]

    def of(self, kind: type[Any]) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]

    def fail_once(self, at: Callable[[ArCommand[Any]], bool]) -> None:
        left = [True]

        def fault(command: ArCommand[Any]) -> bool:
            if left and at(command):
                left.clear()
                return True
            return False

        self.fault = fault


def request(*seeds: int, context: RequestContext | None = None, length: int = LENGTH) -> Request:
    resolved = ResolvedRequest(
        parameters=GenerationParameters(prompt="x"),
        requested=(32, 32),  # type: ignore[arg-type]
        grids=(Grid(1, 1),) if length == 1 else (Grid(1, min(PREVIEW, length - 1)), Grid(1, max(1, length - PREVIEW))),
        sampling=Sampling(1.0, 1.0, 1),
        seeds=seeds,
    )
    return Request(context or RequestContext(), (1, 2), resolved)


def tokens_of(*seeds: int, length: int = LENGTH) -> list[list[int]]:
    """The tokens after the preview's."""
    first = min(PREVIEW, length - 1)
    return [[1000 * seed + index for index in range(first, length)] for seed in seeds]


def rows(future: Future[ArResult], seconds: float = 0) -> list[list[int]]:
    tokens: list[list[int]] = future.result(seconds).prior_token_ids.tolist()
    return tokens


class Served:
    """A scheduler that a test steps."""

    def __init__(self, max_queue: int = 4) -> None:
        self.executor = Executor()
        self.scheduler = Scheduler(self.executor.run, SLOTS, max_queue)

    def submit(self, *seeds: int, context: RequestContext | None = None, length: int = LENGTH) -> Future[ArResult]:
        return self.scheduler.submit(request(*seeds, context=context, length=length))

    def run(self) -> None:
        while not self.scheduler.next_wait():
            self.scheduler.step()


@pytest.fixture
def served() -> Served:
    return Served()


def test_images_of_a_request_are_in_the_order_of_their_seeds(served: Served) -> None:
    one, several = served.submit(4), served.submit(7, 3, 9, 1, 2)
    served.run()
    assert rows(one) == tokens_of(4)
    assert rows(several) == tokens_of(7, 3, 9, 1, 2)


def test_result_counts_tokens_by_kind(served: Served) -> None:
    future = served.submit(4)
    served.run()
    assert future.result(0).tokens == {"prompt": 2, "source": 0, "preview": PREVIEW, "image": LENGTH - PREVIEW}


def test_sequence_of_one_token_needs_no_step(served: Served) -> None:
    future = served.submit(5, length=1)
    served.run()
    assert rows(future) == [[5000]]
    assert not served.executor.of(Step)


def test_requests_are_admitted_in_the_order_of_arrival(served: Served) -> None:
    first = served.submit(0)
    served.scheduler.step()
    others = [served.submit(seed) for seed in (1, 2, 12, 11)]
    served.run()
    assert [rows(future) for future in (first, *others)] == [tokens_of(seed) for seed in (0, 1, 2, 12, 11)]
    assert served.executor.seeds() == [0, 1, 2, 12, 11]


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(2, 40), st.integers(1, 5), st.none() | st.integers(0, 50), st.integers(0, 20)),
        min_size=1,
        max_size=12,
    )
)
def test_every_request_gets_its_own_tokens_whatever_is_cancelled(
    requests: list[tuple[int, int, int | None, int]],
) -> None:
    served = Served(max_queue=100)
    submitted = []
    for number, (length, images, cancel_after, steps_before) in enumerate(requests):
        for _ in range(steps_before):
            served.scheduler.step()
        seeds = tuple(range(100 * number, 100 * number + images))
        context = RequestContext()
        submitted.append((seeds, length, cancel_after, served.submit(*seeds, length=length, context=context)))
        if cancel_after is not None:
            for _ in range(cancel_after):
                served.scheduler.step()
            context.cancel()
    served.run()
    for seeds, length, cancel_after, future in submitted:
        if cancel_after is not None and future.exception(0) is not None:
            with pytest.raises(CancelledError):
                future.result(0)
        else:
            assert rows(future) == tokens_of(*seeds, length=length)
    ended = len(served.executor.of(Release)) + len(served.executor.of(Discard))
    assert len(served.executor.of(Admit)) == ended


def test_full_queue_refuses_and_keeps_what_waits(served: Served) -> None:
    running = served.submit(0)
    served.scheduler.step()
    waiting = [served.submit(seed) for seed in (1, 2, 10, 11)]
    with pytest.raises(QueueFullError, match=r"has 4 requests waiting.*max_queue.*later"):
        served.submit(12)
    served.run()
    assert [rows(future) for future in [running, *waiting]] == [tokens_of(seed) for seed in (0, 1, 2, 10, 11)]
    again = served.submit(30)
    served.run()
    assert rows(again) == tokens_of(30)


def test_cancelled_request_gives_its_slot_back(served: Served) -> None:
    unwanted, waiting_unwanted = RequestContext(), RequestContext()
    first = served.submit(1, length=1000, context=unwanted)
    served.scheduler.step()
    others = [served.submit(2, 3), served.submit(4, context=waiting_unwanted), served.submit(5)]
    unwanted.cancel()
    waiting_unwanted.cancel()
    with pytest.raises(CancelledError):  # without a step
        others[1].result(0)
    assert not first.done()
    served.run()
    with pytest.raises(CancelledError):
        first.result(0)
    assert rows(others[0]) == tokens_of(2, 3)
    assert rows(others[2]) == tokens_of(5)
    assert 4 not in served.executor.seeds()
    assert sum(command.count for command in served.executor.of(Step)) < 100
    assert len(served.executor.of(Discard)) == 1  # the others' steps are not waited for


def test_late_request_is_ended_while_it_waits_and_while_it_runs(served: Served) -> None:
    with pytest.raises(DeadlineExceededError):
        served.submit(1, context=RequestContext(deadline_ns=1))
    assert served.executor.seeds() == []
    context = RequestContext()
    running = served.submit(2, context=context, length=1000)
    served.scheduler.step()
    context.deadline_ns = 1
    served.run()
    with pytest.raises(DeadlineExceededError):
        running.result(0)
    held = [served.submit(seed) for seed in range(SLOTS)]
    served.scheduler.step()
    waiting_context = RequestContext()
    waiting = served.submit(5, context=waiting_context)
    waiting_context.deadline_ns = 1
    served.scheduler.step()
    with pytest.raises(DeadlineExceededError):
        waiting.result(0)
    served.run()
    assert [rows(future) for future in held] == [tokens_of(seed) for seed in range(SLOTS)]


class PreviewObserver(RequestObserver):
    def __init__(self) -> None:
        self.previews: list[list[int]] = []

    def preview_sampled(self, context: RequestContext, tokens: NDArray[np.int32]) -> None:
        self.previews.append(tokens.tolist())


def test_preview_is_published_once_its_tokens_are_sampled(served: Served) -> None:
    observer = PreviewObserver()
    served.submit(7, 8, context=RequestContext(observers=(observer,)))
    for _ in range(PREVIEW - 2):
        served.scheduler.step()
        assert observer.previews == []
    served.run()
    assert observer.previews == [[7000 + index for index in range(PREVIEW)]]
    assert len(served.executor.of(Peek)) == 1


def test_fault_at_a_peek_ends_its_request_alone(served: Served) -> None:
    served.executor.fail_once(lambda command: isinstance(command, Peek))
    faulty = served.submit(1, context=RequestContext(observers=(PreviewObserver(),)))
    other = served.submit(2)
    served.run()
    with pytest.raises(RuntimeError, match="fault at Peek"):
        faulty.result(0)
    assert rows(other) == tokens_of(2)


def test_fault_at_a_prompt_ends_its_request_alone(served: Served) -> None:
    served.executor.fail_once(lambda command: isinstance(command, Admit) and command.seed == 11)
    held = [served.submit(seed) for seed in range(SLOTS)]
    faulty = served.submit(10, 11, 12)
    served.run()
    with pytest.raises(RuntimeError, match="fault at Admit"):
        faulty.result(0)
    assert [rows(future) for future in held] == [tokens_of(seed) for seed in range(SLOTS)]
    assert 12 not in served.executor.seeds()
    again = served.submit(13)
    served.run()
    assert rows(again) == tokens_of(13)


def test_fault_at_a_step_ends_the_batch_and_nothing_else(served: Served) -> None:
    held = [served.submit(seed) for seed in range(SLOTS)]
    waiting = served.submit(10)
    served.executor.fail_once(lambda command: isinstance(command, Step))
    served.run()
    for future in held:
        with pytest.raises(RuntimeError, match="fault at Step"):
            future.result(0)
    assert rows(waiting) == tokens_of(10)
    again = served.submit(13)
    served.run()
    assert rows(again) == tokens_of(13)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_fault_at_a_release_ends_its_request_alone(served: Served, images: int) -> None:
    served.executor.fail_once(lambda command: isinstance(command, Release))
    faulty = served.submit(*range(images))
    served.run()
    with pytest.raises(RuntimeError, match="fault at Release"):
        faulty.result(0)
    again = served.submit(13)
    served.run()
    assert rows(again) == tokens_of(13)


def test_executor_that_always_fails_still_answers(served: Served) -> None:
    served.executor.fault = lambda command: not isinstance(command, Admit)
    futures = [served.submit(seed, seed + 1) for seed in (0, 2)]
    served.run()
    for future in futures:
        with pytest.raises(RuntimeError, match="fault at Step"):
            future.result(0)


def test_progress_and_seconds_are_reported(served: Served) -> None:
    seen: list[Progress] = []
    context = RequestContext(observers=(ProgressCallback(seen.append),))
    served.submit(*range(5), length=100, context=context)
    served.run()
    done = [progress.done for progress in seen if progress.stage == Stage.DECODE]
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] <= 500
    assert {(progress.stage, progress.total) for progress in seen} == {(Stage.PREFILL, 5), (Stage.DECODE, 500)}
    assert [progress.done for progress in seen if progress.stage == Stage.PREFILL] == [1, 2, 3, 4, 5]
    assert context.seconds.keys() == {Stage.AR_QUEUE, Stage.PREFILL, Stage.DECODE}
    assert all(seconds >= 0 for seconds in context.seconds.values())


def test_requests_of_equal_content_are_distinct(served: Served) -> None:
    context, other = RequestContext(id="same"), RequestContext(id="same")
    held = [served.submit(0)]
    served.scheduler.step()
    held += [served.submit(1), served.submit(2)]
    kept, cancelled = served.submit(10, context=context), served.submit(10, context=other)
    other.cancel()
    served.run()
    assert [rows(future) for future in held] == [tokens_of(seed) for seed in range(SLOTS)]
    assert rows(kept) == tokens_of(10)
    with pytest.raises(CancelledError):
        cancelled.result(0)


def test_end_all_answers_what_runs_and_what_waits(served: Served) -> None:
    running = served.submit(1, 2)
    served.scheduler.step()
    waiting = served.submit(3)
    served.scheduler.end_all(UnavailableError("stopping"))
    for future in (running, waiting):
        with pytest.raises(UnavailableError, match="stopping"):
            future.result(0)
    with pytest.raises(UnavailableError, match="stopping"):
        served.submit(4)
    assert len(served.executor.of(Discard)) == 2


class Threaded:
    """A scheduler in its thread, whose steps wait while ``may_step`` is not set."""

    def __init__(self, max_queue: int = 4, admission: Admission | None = None) -> None:
        self.executor = Executor()
        self.may_step, self.admitted = threading.Event(), threading.Event()
        self.may_step.set()
        self.executor.before = self._before
        self.thread = SchedulerThread(Scheduler(self.executor.run, SLOTS, max_queue, admission=admission))

    def _before(self, command: ArCommand[Any]) -> None:
        if isinstance(command, Admit):
            self.admitted.set()
        if isinstance(command, Step):
            assert self.may_step.wait(WAIT_SECONDS)

    def submit(self, *seeds: int, context: RequestContext | None = None, length: int = LENGTH) -> Future[ArResult]:
        return self.thread.submit(request(*seeds, context=context, length=length))

    def hold(self) -> list[Future[ArResult]]:
        """Submits as many sequences as there are slots, the first of which is admitted and waits in a step."""
        self.may_step.clear()
        held = [self.submit(0)]
        assert self.admitted.wait(WAIT_SECONDS)
        return held + [self.submit(seed) for seed in range(1, SLOTS)]


@pytest.fixture
def threaded() -> Iterator[Threaded]:
    made = Threaded()
    yield made
    made.may_step.set()
    made.thread.close()


@settings(max_examples=40)
@given(requests=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 5), st.booleans()), min_size=1, max_size=12))
def test_thread_serves_every_request_whatever_is_cancelled(requests: list[tuple[int, int, bool]]) -> None:
    threaded = Threaded(max_queue=100)
    submitted = []
    for number, (length, images, is_cancelled) in enumerate(requests):
        seeds = tuple(range(100 * number, 100 * number + images))
        context = RequestContext()
        submitted.append((seeds, length, is_cancelled, threaded.submit(*seeds, length=length, context=context)))
        if is_cancelled:
            context.cancel()
    for seeds, length, is_cancelled, future in submitted:
        if is_cancelled and future.exception(WAIT_SECONDS) is not None:
            with pytest.raises(CancelledError):
                future.result()
        else:
            assert rows(future, WAIT_SECONDS) == tokens_of(*seeds, length=length)
    threaded.thread.close()
    ended = len(threaded.executor.of(Release)) + len(threaded.executor.of(Discard))
    assert len(threaded.executor.of(Admit)) == ended


def test_closing_answers_every_request(threaded: Threaded) -> None:
    futures = [*threaded.hold(), threaded.submit(10, 11)]
    closing = threading.Thread(target=threaded.thread.close)
    closing.start()
    refusal = ""
    while "stopping" not in refusal:  # full at first, until closing has begun
        try:
            futures.append(threaded.submit(12))
        except UnavailableError as error:
            refusal = str(error)
    threaded.may_step.set()
    closing.join(WAIT_SECONDS)
    for future in futures:
        with pytest.raises(UnavailableError, match="stopping"):
            future.result(0)
    with pytest.raises(UnavailableError, match="stopping"):
        threaded.submit(13)
    threaded.thread.close()


def test_waiting_request_is_cancelled_during_a_step(threaded: Threaded) -> None:
    threaded.hold()
    context = RequestContext()
    waiting = threaded.submit(9, context=context)
    context.cancel()
    with pytest.raises(CancelledError):
        waiting.result(0)


def test_progress_callback_may_end_its_own_request(threaded: Threaded) -> None:
    context = RequestContext()
    context.add_observer(ProgressCallback(lambda progress: setattr(context, "deadline_ns", 1)))
    with pytest.raises(DeadlineExceededError):
        threaded.submit(2, context=context, length=1000).result(WAIT_SECONDS)
    assert rows(threaded.submit(3), WAIT_SECONDS) == tokens_of(3)


def test_prepare_and_commands_run_in_the_same_thread() -> None:
    names: list[str] = []
    executor = Executor()
    executor.before = lambda command: names.append(threading.current_thread().name)
    thread = SchedulerThread(
        Scheduler(executor.run, SLOTS, 1), lambda: names.append(f"prepare in {threading.current_thread().name}")
    )
    assert names == ["prepare in ar-scheduler"]
    thread.submit(request(1)).result(WAIT_SECONDS)
    assert set(names[1:]) == {"ar-scheduler"}
    thread.close()


def test_error_of_prepare_is_raised() -> None:
    def prepare() -> None:
        raise RuntimeError("fault at Step")

    with pytest.raises(RuntimeError, match="fault at Step"):
        SchedulerThread(Scheduler(Executor().run, SLOTS, 1), prepare)


class FaultyAdmission(ImmediateAdmission):
    def __init__(self) -> None:
        self.is_faulty = False

    def wait(self, queue: QueueSnapshot) -> float:
        if self.is_faulty:
            raise ValueError("a fault of the policy")
        return 0.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_fault_of_the_scheduler_answers_every_request() -> None:
    admission = FaultyAdmission()
    threaded = Threaded(admission=admission)
    held = threaded.hold()
    admission.is_faulty = True
    threaded.may_step.set()
    for future in held:
        with pytest.raises(ValueError, match="a fault of the policy"):
            future.result(WAIT_SECONDS)
    with pytest.raises(UnavailableError, match="stopping"):
        threaded.submit(5)
    threaded.thread.close()

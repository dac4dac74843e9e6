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

from glm_image.ar.commands import Admit, Command, Release, Step
from glm_image.ar.scheduler import Scheduler
from glm_image.errors import CancelledError, DeadlineExceededError, UnavailableError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.request.geometry import Grid
from glm_image.request.parameters import GenerationParameters, ResolvedRequest, Sampling
from glm_image.request.stages import Stage

SLOTS = 3
LENGTH = 10
WAIT_SECONDS = 30

Tokens = NDArray[np.int32]


class Executor:
    """Keeps the books of an executor, and holds it to its contract: token i of a sequence is 1000 * seed + i."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.may_step = threading.Event()
        self.may_step.set()
        self.admitted = threading.Event()
        self.fault: Callable[[Command], bool] = lambda _: False
        self._sequences: dict[int, list[int]] = {}

    def run(self, command: Command) -> Tokens | None:
        self.commands.append(command)
        if isinstance(command, Step):
            assert self.may_step.wait(WAIT_SECONDS)
            assert command.count >= 1
            for sequence in self._sequences.values():
                sequence[1] += command.count
                assert sequence[1] <= sequence[2], "a sequence has fewer tokens left"
        elif isinstance(command, Admit):
            assert 0 <= command.slot < SLOTS
            assert command.slot not in self._sequences, "the slot is taken"
            self._sequences[command.slot] = [command.seed, 1, sum(grid.tokens for grid in command.grids)]
            self.admitted.set()
        released = self._sequences.pop(command.slot, None) if isinstance(command, Release) else None
        if self.fault(command):
            raise RuntimeError(f"fault at {type(command).__name__}")
        if released is None:
            return None
        seed, drawn, _ = released
        return np.arange(1000 * seed, 1000 * seed + drawn, dtype=np.int32)

    def seeds(self) -> list[int]:
        return [command.seed for command in self.commands if isinstance(command, Admit)]


def request(*seeds: int, length: int = LENGTH) -> ResolvedRequest:
    return ResolvedRequest(
        parameters=GenerationParameters(prompt="x"),
        requested=(32, 32),  # type: ignore[arg-type]
        grids=(Grid(1, length - 1), Grid(1, 1)),
        sampling=Sampling(1.0, 1.0, 1),
        seeds=seeds,
    )


def tokens_of(*seeds: int, length: int = LENGTH) -> list[list[int]]:
    return [[1000 * seed + index for index in range(length)] for seed in seeds]


class Served:
    def __init__(self, max_queue: int = 4) -> None:
        self.executor = Executor()
        self.scheduler = Scheduler(self.executor.run, SLOTS, max_queue)

    def submit(self, *seeds: int, context: RequestContext | None = None, length: int = LENGTH) -> Future[Tokens]:
        return self.scheduler.submit(context or RequestContext(), (1, 2), request(*seeds, length=length))

    def hold(self) -> list[Future[Tokens]]:
        """Fills all slots with sequences that do not go on until ``may_step`` is set."""
        self.executor.may_step.clear()
        held = []
        for seed in range(SLOTS):
            self.executor.admitted.clear()
            held.append(self.submit(seed))
            if seed == 0:
                assert self.executor.admitted.wait(WAIT_SECONDS)
        return held


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.executor.may_step.set()
    made.scheduler.close()


def rows(future: Future[Tokens]) -> list[list[int]]:
    tokens: list[list[int]] = future.result(WAIT_SECONDS).tolist()
    return tokens


def test_pictures_of_a_request_come_in_the_order_of_their_seeds(served: Served) -> None:
    assert rows(served.submit(4)) == tokens_of(4)
    assert rows(served.submit(7, 3, 9, 1, 2)) == tokens_of(7, 3, 9, 1, 2)


def test_a_sequence_of_one_token_needs_no_step(served: Served) -> None:
    one = ResolvedRequest(GenerationParameters(prompt="x"), (32, 32), (Grid(1, 1),), Sampling(1.0, 1.0, 1), (5,))  # type: ignore[arg-type]
    assert rows(served.scheduler.submit(RequestContext(), (1,), one)) == [[5000]]
    assert not any(isinstance(command, Step) for command in served.executor.commands)


def test_whoever_came_first_is_let_in_first(served: Served) -> None:
    held = served.hold()
    waiting = [served.submit(seed) for seed in (12, 11)]
    served.executor.may_step.set()
    assert [rows(future) for future in held + waiting] == [tokens_of(seed) for seed in (0, 1, 2, 12, 11)]
    assert served.executor.seeds() == [0, 1, 2, 12, 11]


@settings(max_examples=40)
@given(requests=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 5), st.booleans()), min_size=1, max_size=12))
def test_every_request_gets_its_own_tokens(requests: list[tuple[int, int, bool]]) -> None:
    served = Served(max_queue=100)
    submitted = []
    for number, (length, pictures, cancelled) in enumerate(requests):
        seeds = tuple(range(100 * number, 100 * number + pictures))
        context = RequestContext()
        submitted.append((seeds, length, cancelled, served.submit(*seeds, length=length, context=context)))
        if cancelled:
            context.cancel()
    for seeds, length, cancelled, future in submitted:
        if cancelled and future.exception(WAIT_SECONDS) is not None:
            with pytest.raises(CancelledError):
                future.result()
        else:
            assert rows(future) == tokens_of(*seeds, length=length)
    served.scheduler.close()
    admits, releases = (sum(isinstance(c, kind) for c in served.executor.commands) for kind in (Admit, Release))
    assert admits == releases


def test_a_full_queue_refuses_and_loses_nobody(served: Served) -> None:
    held = served.hold()
    waiting = [served.submit(seed) for seed in (10, 11)]
    # The first of the held requests runs; the other two wait with these two.
    with pytest.raises(UnavailableError, match=r"has 4 requests waiting.*max_queue.*later"):
        served.submit(12)
    served.executor.may_step.set()
    assert [rows(future) for future in held + waiting] == [tokens_of(seed) for seed in (0, 1, 2, 10, 11)]
    assert rows(served.submit(30)) == tokens_of(30)


def test_closing_answers_everyone(served: Served) -> None:
    futures = [*served.hold(), served.submit(10, 11)]
    closing = threading.Thread(target=served.scheduler.close)
    closing.start()
    refusal = ""
    while "stopping" not in refusal:  # full at first, until closing has begun
        try:
            futures.append(served.submit(12))
        except UnavailableError as error:
            refusal = str(error)
    served.executor.may_step.set()
    closing.join(WAIT_SECONDS)
    for future in futures:
        with pytest.raises(UnavailableError, match="stopping"):
            future.result(0)
    with pytest.raises(UnavailableError, match="stopping"):
        served.submit(13)
    served.scheduler.close()


def test_a_cancelled_request_gives_its_slot_back(served: Served) -> None:
    unwanted, waiting_unwanted = RequestContext(), RequestContext()
    served.executor.may_step.clear()
    first = served.submit(1, length=1000, context=unwanted)
    assert served.executor.admitted.wait(WAIT_SECONDS)
    others = [served.submit(2, 3), served.submit(4, context=waiting_unwanted), served.submit(5)]
    unwanted.cancel()
    waiting_unwanted.cancel()
    served.executor.may_step.set()
    for future in (first, others[1]):
        with pytest.raises(CancelledError):
            future.result(WAIT_SECONDS)
    assert rows(others[0]) == tokens_of(2, 3)
    assert rows(others[2]) == tokens_of(5)
    assert 4 not in served.executor.seeds()
    steps = sum(command.count for command in served.executor.commands if isinstance(command, Step))
    assert steps < 100
    dropped = [command for command in served.executor.commands if isinstance(command, Release) and not command.wanted]
    assert len(dropped) == 1  # the others of its steps are not waited for


def test_a_late_request_is_dropped_while_it_waits_and_while_it_runs(served: Served) -> None:
    with pytest.raises(DeadlineExceededError):
        served.submit(1, context=RequestContext(deadline_ns=1)).result(WAIT_SECONDS)
    assert served.executor.seeds() == []
    context = RequestContext()
    context.add_observer(ProgressCallback(lambda progress: setattr(context, "deadline_ns", 1)))
    with pytest.raises(DeadlineExceededError):
        served.submit(2, context=context, length=1000).result(WAIT_SECONDS)
    assert rows(served.submit(3)) == tokens_of(3)


def fail_once(executor: Executor, at: Callable[[Command], bool]) -> None:
    left = [True]

    def fault(command: Command) -> bool:
        if left and at(command):
            left.clear()
            return True
        return False

    executor.fault = fault


def test_a_fault_at_one_prompt_ends_its_request_alone(served: Served) -> None:
    fail_once(served.executor, lambda command: isinstance(command, Admit) and command.seed == 11)
    held = served.hold()
    faulty = served.submit(10, 11, 12)
    served.executor.may_step.set()
    with pytest.raises(RuntimeError, match="fault at Admit"):
        faulty.result(WAIT_SECONDS)
    assert [rows(future) for future in held] == [tokens_of(seed) for seed in range(SLOTS)]
    assert 12 not in served.executor.seeds()
    assert rows(served.submit(13)) == tokens_of(13)


def test_a_fault_at_a_step_ends_the_batch_and_nothing_else(served: Served) -> None:
    held = served.hold()
    waiting = served.submit(10)
    # The first step has one sequence, the second has all slots full.
    fail_once(served.executor, lambda command: isinstance(command, Step) and len(served.executor.seeds()) == SLOTS)
    served.executor.may_step.set()
    for future in held:
        with pytest.raises(RuntimeError, match="fault at Step"):
            future.result(WAIT_SECONDS)
    assert rows(waiting) == tokens_of(10)
    assert rows(served.submit(13)) == tokens_of(13)


@pytest.mark.parametrize("pictures", [1, 2, 3])
def test_a_fault_at_a_release_ends_its_request_alone(served: Served, pictures: int) -> None:
    fail_once(served.executor, lambda command: isinstance(command, Release))
    with pytest.raises(RuntimeError, match="fault at Release"):
        served.submit(*range(pictures)).result(WAIT_SECONDS)
    assert rows(served.submit(13)) == tokens_of(13)


def test_an_executor_that_only_fails_still_answers(served: Served) -> None:
    served.executor.fault = lambda command: not isinstance(command, Admit)
    futures = [served.submit(seed, seed + 1) for seed in (0, 2)]
    for future in futures:
        with pytest.raises(RuntimeError, match="fault at Step"):
            future.result(WAIT_SECONDS)


def test_progress_and_seconds_are_told(served: Served) -> None:
    seen: list[Progress] = []
    context = RequestContext(observers=(ProgressCallback(seen.append),))
    served.submit(*range(5), length=100, context=context).result(WAIT_SECONDS)
    done = [progress.done for progress in seen if progress.stage == Stage.DECODE]
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] <= 500
    assert {(progress.stage, progress.total) for progress in seen} == {("prefill", 5), ("decode", 500)}
    assert [progress.done for progress in seen if progress.stage == Stage.PREFILL] == [1, 2, 3, 4, 5]
    assert context.seconds.keys() == {"ar_queue", "prefill", "decode"}
    assert all(seconds >= 0 for seconds in context.seconds.values())


def test_requests_of_equal_content_are_not_mistaken_for_each_other(served: Served) -> None:
    context: Any = RequestContext(id="same")
    other = RequestContext(id="same")
    held = served.hold()
    twins = [served.submit(10, context=context), served.submit(10, context=other)]
    other.cancel()
    served.executor.may_step.set()
    assert [rows(future) for future in held] == [tokens_of(seed) for seed in range(SLOTS)]
    assert rows(twins[0]) == tokens_of(10)
    with pytest.raises(CancelledError):
        twins[1].result(WAIT_SECONDS)


def test_first_commands_run_in_the_thread_of_all_others() -> None:
    threads: list[str] = []

    def run(command: Command) -> None:
        threads.append(f"{type(command).__name__} in {threading.current_thread().name}")

    scheduler = Scheduler(run, SLOTS, 1, first=(Step(1), Release(0)))
    assert threads == ["Step in ar-scheduler", "Release in ar-scheduler"]
    scheduler.close()


def test_a_fault_of_the_first_commands_is_told() -> None:
    def run(command: Command) -> None:
        raise RuntimeError(f"fault at {type(command).__name__}")

    with pytest.raises(RuntimeError, match="fault at Step"):
        Scheduler(run, SLOTS, 1, first=(Step(1),))

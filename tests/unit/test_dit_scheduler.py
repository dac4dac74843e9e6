from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_image.dit.commands import Command, Decode, Drop, Prepare, Step
from glm_image.dit.scheduler import Scheduler
from glm_image.errors import CancelledError, DeadlineExceededError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.request.geometry import Grid, Size
from glm_image.request.parameters import PaintRequest

STEPS = 3
WAIT_SECONDS = 30


class Executor:
    """Keeps the books of an executor: a picture's pixel is its seed."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.pictures: dict[int, Prepare] = {}
        self.before: Callable[[Command], None] = lambda _: None

    def run(self, command: Command) -> NDArray[Any] | None:
        self.commands.append(command)
        self.before(command)
        if isinstance(command, Prepare):
            assert command.picture not in self.pictures
            self.pictures[command.picture] = command
            return np.linspace(1, 0, STEPS + 1, dtype=np.float32)
        if isinstance(command, Step):
            assert command.picture in self.pictures
        elif isinstance(command, Decode):
            return np.full((1, 1, 3), self.pictures.pop(command.picture).seed, dtype=np.uint8)
        else:
            self.pictures.pop(command.picture, None)
        return None


def request(*seeds: int) -> PaintRequest:
    return PaintRequest(
        prompt="a 'b'",
        negative_prompt="'c'",
        prior_token_ids=np.arange(2 * len(seeds), dtype=np.int32).reshape(-1, 2),
        grid=Grid(1, 2),
        requested=Size(32, 64),
        seeds=seeds,
        num_inference_steps=STEPS,
        guidance_scale=2.5,
    )


def kinds(executor: Executor) -> list[str]:
    return [type(command).__name__ for command in executor.commands]


def test_pictures_are_painted_one_after_the_other() -> None:
    executor, seen = Executor(), list[Progress]()
    scheduler, context = Scheduler(executor.run), RequestContext(observers=(ProgressCallback(seen.append),))
    pictures = scheduler.denoise(context, request(7, 8))
    assert kinds(executor) == (["Prepare"] + ["Step"] * STEPS) * 2
    prepared = [command for command in executor.commands if isinstance(command, Prepare)]
    assert [(p.seed, p.prior_token_ids.tolist()) for p in prepared] == [(7, [0, 1]), (8, [2, 3])]
    assert {(p.prompt, p.negative_prompt, p.num_inference_steps, p.guidance_scale) for p in prepared} == {
        ("a 'b'", "'c'", STEPS, 2.5)
    }
    assert [(p.stage, p.done, p.total) for p in seen] == [("denoise", done, 6) for done in range(1, 7)]
    assert scheduler.decode(context, pictures)[:, 0, 0, 0].tolist() == [7, 8]
    assert executor.pictures == {}
    assert context.seconds.keys() == {"condition", "denoise", "vae"}


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_a_cancelled_request_stops_at_its_next_step_and_leaves_nothing(steps_before: int) -> None:
    executor, context = Executor(), RequestContext()
    if steps_before == 0:
        context.cancel()
    context.add_observer(ProgressCallback(lambda progress: context.cancel() if progress.done == steps_before else None))
    scheduler = Scheduler(executor.run)
    with pytest.raises(CancelledError):
        scheduler.denoise(context, request(7, 8))
    assert kinds(executor).count("Step") == steps_before
    assert executor.pictures == {}
    assert len(scheduler.denoise(RequestContext(), request(9))) == 1


def test_a_late_request_stops() -> None:
    executor = Executor()
    with pytest.raises(DeadlineExceededError):
        Scheduler(executor.run).denoise(RequestContext(deadline_ns=1), request(7))
    assert kinds(executor).count("Prepare") == 0


@pytest.mark.parametrize("kind", [Prepare, Step, Decode])
def test_a_fault_leaves_nothing_and_the_next_request_is_painted(kind: type[Command]) -> None:
    executor = Executor()
    scheduler = Scheduler(executor.run)

    def fail(command: Command) -> None:
        if isinstance(command, kind):
            raise RuntimeError("fault")

    executor.before = fail
    with pytest.raises(RuntimeError, match="fault"):
        scheduler.decode(RequestContext(), scheduler.denoise(RequestContext(), request(7, 8)))
    executor.before = lambda _: None
    assert executor.pictures == {}
    assert scheduler.decode(RequestContext(), scheduler.denoise(RequestContext(), request(9)))[0, 0, 0, 0] == 9


def test_requests_take_turns_and_decoding_waits_for_none() -> None:
    executor = Executor()
    scheduler = Scheduler(executor.run)
    first = scheduler.denoise(RequestContext(), request(1))
    executor.commands.clear()
    stepping, may_go_on = threading.Event(), threading.Event()

    def hold(command: Command) -> None:
        if isinstance(command, Step):
            stepping.set()
            assert may_go_on.wait(WAIT_SECONDS)

    executor.before = hold
    with ThreadPoolExecutor(2) as threads:
        painting = [threads.submit(scheduler.denoise, RequestContext(), request(seed)) for seed in (2, 3)]
        assert stepping.wait(WAIT_SECONDS)
        assert scheduler.decode(RequestContext(), first)[0, 0, 0, 0] == 1
        may_go_on.set()
        names = [future.result(WAIT_SECONDS)[0] for future in painting]
    steps = [command.picture for command in executor.commands if isinstance(command, Step)]
    assert steps in ([names[0]] * STEPS + [names[1]] * STEPS, [names[1]] * STEPS + [names[0]] * STEPS)
    prepares = [index for index, command in enumerate(executor.commands) if isinstance(command, Prepare)]
    assert sum(isinstance(command, Step) for command in executor.commands[prepares[0] : prepares[1]]) == STEPS
    assert isinstance(executor.commands[-1], Step)
    assert not any(isinstance(command, Drop) and command.picture in names for command in executor.commands)

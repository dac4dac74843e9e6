from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from glm_image.dit.commands import Decode, Drop, Prepare, Step
from glm_image.dit.scheduler import Scheduler
from glm_image.errors import CancelledError, DeadlineExceededError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.parallel.commands import Command
from glm_image.request.geometry import Grid, Size
from glm_image.request.parameters import PaintRequest

STEPS = 3
WAIT_SECONDS = 30


class Executor:
    """Tracks the images of an executor without tensors: an image's pixel is its seed."""

    def __init__(self) -> None:
        self.commands: list[Command[Any]] = []
        self.images: dict[int, Prepare] = {}
        self.before: Callable[[Command[Any]], None] = lambda _: None

    def run(self, command: Command[Any]) -> Any:
        self.commands.append(command)
        self.before(command)
        match command:
            case Prepare():
                assert command.image not in self.images
                self.images[command.image] = command
                return np.linspace(1, 0, STEPS + 1, dtype=np.float32)
            case Step():
                assert command.image in self.images
                return False
            case Decode():
                return np.full((1, 1, 3), self.images.pop(command.image).seed, dtype=np.uint8)
            case Drop():
                return self.images.pop(command.image, None) and None
            case _:
                raise AssertionError(f"{command} is unexpected")


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


def test_images_are_denoised_one_after_the_other() -> None:
    executor, seen = Executor(), list[Progress]()
    scheduler, context = Scheduler(executor.run), RequestContext(observers=(ProgressCallback(seen.append),))
    images = scheduler.denoise(context, request(7, 8))
    assert kinds(executor) == (["Prepare"] + ["Step"] * STEPS) * 2
    prepared = [command for command in executor.commands if isinstance(command, Prepare)]
    assert [(p.seed, p.prior_token_ids.tolist()) for p in prepared] == [(7, [0, 1]), (8, [2, 3])]
    assert {(p.rendered_text, p.negative_text, p.num_inference_steps, p.guidance_scale) for p in prepared} == {
        (("b",), ("c",), STEPS, 2.5)
    }
    assert [(p.stage, p.done, p.total) for p in seen] == [
        ("condition", 0, 1),
        *(("denoise", done, 6) for done in range(1, 7)),
    ]
    assert scheduler.decode(context, images)[:, 0, 0, 0].tolist() == [7, 8]
    assert executor.images == {}
    assert context.seconds.keys() == {"dit_queue", "condition", "denoise", "vae"}


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_cancelled_request_stops_at_its_next_step_and_drops_its_images(steps_before: int) -> None:
    executor, context = Executor(), RequestContext()
    if steps_before == 0:
        context.cancel()
    context.add_observer(ProgressCallback(lambda progress: context.cancel() if progress.done == steps_before else None))
    scheduler = Scheduler(executor.run)
    with pytest.raises(CancelledError):
        scheduler.denoise(context, request(7, 8))
    assert kinds(executor).count("Step") == steps_before
    assert executor.images == {}
    assert len(scheduler.denoise(RequestContext(), request(9))) == 1


def test_late_request_stops_before_it_is_prepared() -> None:
    executor = Executor()
    with pytest.raises(DeadlineExceededError):
        Scheduler(executor.run).denoise(RequestContext(deadline_ns=1), request(7))
    assert kinds(executor).count("Prepare") == 0


@pytest.mark.parametrize("kind", [Prepare, Step, Decode])
def test_fault_drops_the_images_and_the_next_request_is_rendered(kind: type[Command[Any]]) -> None:
    executor = Executor()
    scheduler = Scheduler(executor.run)

    def fail(command: Command[Any]) -> None:
        if isinstance(command, kind):
            raise RuntimeError("fault")

    executor.before = fail
    with pytest.raises(RuntimeError, match="fault"):
        scheduler.decode(RequestContext(), scheduler.denoise(RequestContext(), request(7, 8)))
    executor.before = lambda _: None
    assert executor.images == {}
    assert scheduler.decode(RequestContext(), scheduler.denoise(RequestContext(), request(9)))[0, 0, 0, 0] == 9


def test_requests_denoise_in_turn_and_decoding_waits_for_none() -> None:
    executor = Executor()
    scheduler = Scheduler(executor.run)
    first = scheduler.denoise(RequestContext(), request(1))
    executor.commands.clear()
    stepping, may_go_on = threading.Event(), threading.Event()

    def hold(command: Command[Any]) -> None:
        if isinstance(command, Step):
            stepping.set()
            assert may_go_on.wait(WAIT_SECONDS)

    executor.before = hold
    with ThreadPoolExecutor(2) as threads:
        denoising = [threads.submit(scheduler.denoise, RequestContext(), request(seed)) for seed in (2, 3)]
        assert stepping.wait(WAIT_SECONDS)
        assert scheduler.decode(RequestContext(), first)[0, 0, 0, 0] == 1
        may_go_on.set()
        numbers = [future.result(WAIT_SECONDS)[0] for future in denoising]
    steps = [command.image for command in executor.commands if isinstance(command, Step)]
    assert steps in ([numbers[0]] * STEPS + [numbers[1]] * STEPS, [numbers[1]] * STEPS + [numbers[0]] * STEPS)
    prepares = [index for index, command in enumerate(executor.commands) if isinstance(command, Prepare)]
    assert sum(isinstance(command, Step) for command in executor.commands[prepares[0] : prepares[1]]) == STEPS
    assert isinstance(executor.commands[-1], Step)
    assert not any(isinstance(command, Drop) and command.image in numbers for command in executor.commands)

"""Source images in both schedulers: encoded and read once per request, and freed whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glm_image.ar import commands as ar
from glm_image.ar.scheduler import Scheduler as ArScheduler
from glm_image.ar.sequence import Request, Sources
from glm_image.dit import executor as dit
from glm_image.dit.scheduler import Scheduler as DitScheduler
from glm_image.errors import CancelledError
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import Grid, PlacedGrid, Size
from glm_image.request.parameters import GenerationParameters, PaintRequest, ResolvedRequest, Sampling
from glm_image.request.source_images import SourcePicture

PLACED = (PlacedGrid(1, Grid(1, 2)), PlacedGrid(4, Grid(2, 1)))
PROMPT = (10, 99, 99, 11, 99, 99, 12)


class ArExecutor:
    """Keeps the books of the AR's executor; token i of a source is its first patch's value + i."""

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self.fault: Callable[[Any], bool] = lambda _: False
        self._sampled: dict[int, int] = {}

    def run(self, command: Any) -> Any:
        self.commands.append(command)
        if self.fault(command):
            raise RuntimeError("out of memory")
        match command:
            case ar.Encode(patches, grids):
                first, count = int(patches[0, 0]), sum(grid.tokens for grid in grids)
                return np.arange(first, first + count, dtype=np.int32)
            case ar.Admit(slot):
                self._sampled[slot] = 1
            case ar.Step(count):
                self._sampled = {slot: sampled + count for slot, sampled in self._sampled.items()}
            case ar.Release(slot) | ar.Discard(slot):
                return np.zeros(self._sampled.pop(slot, 0), dtype=np.int32)
        return None

    def of(self, kind: type) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]


def resolved(*seeds: int) -> ResolvedRequest:
    grids = (Grid(2, 3),)
    return ResolvedRequest(GenerationParameters(prompt="x"), Size(64, 96), grids, Sampling(1.0, 1.0, 1), seeds)


def ar_request(*seeds: int, first: int) -> Request:
    """A request whose source images begin with the token ``first``."""
    sources = Sources(np.full((4, 3), first, dtype=np.float32), PLACED)
    return Request(RequestContext(), PROMPT, resolved(*seeds), sources=sources)


def run_all(scheduler: ArScheduler) -> None:
    while not scheduler.next_wait():
        scheduler.step()


@pytest.fixture
def executor() -> ArExecutor:
    return ArExecutor()


def test_sources_are_encoded_once_for_all_images_and_inserted_at_their_positions(executor: ArExecutor) -> None:
    scheduler = ArScheduler(executor.run, 2, 4)
    future = scheduler.submit(ar_request(5, 6, 7, first=20))
    run_all(scheduler)
    result = future.result(0)
    assert result.prior_token_ids.shape == (3, 6)
    (encoded,) = executor.of(ar.Encode)
    assert encoded.grids == (Grid(1, 2), Grid(2, 1))
    assert result.source_token_ids.tolist() == [20, 21, 22, 23]
    assert result.source_grids == (Grid(1, 2), Grid(2, 1))
    assert result.tokens == {"prompt": 3, "source": 4, "preview": 0, "image": 6}
    admitted = executor.of(ar.Admit)
    assert [command.seed for command in admitted] == [5, 6, 7]
    assert {command.prompt_ids for command in admitted} == {(10, 20, 21, 11, 22, 23, 12)}
    assert {command.sources for command in admitted} == {PLACED}
    assert executor.commands.index(encoded) < executor.commands.index(admitted[0])


def test_requests_keep_their_own_sources(executor: ArExecutor) -> None:
    scheduler = ArScheduler(executor.run, 3, 8)
    futures = [scheduler.submit(ar_request(seed, first=seed)) for seed in (30, 40)]
    futures.append(scheduler.submit(Request(RequestContext(), (1, 2), resolved(50))))
    run_all(scheduler)
    assert [future.result(0).source_token_ids[:1].tolist() for future in futures] == [[30], [40], []]
    prompts = {command.seed: command.prompt_ids for command in executor.of(ar.Admit)}
    assert prompts == {30: (10, 30, 31, 11, 32, 33, 12), 40: (10, 40, 41, 11, 42, 43, 12), 50: (1, 2)}


def test_request_whose_sources_cannot_be_encoded_ends_alone(executor: ArExecutor) -> None:
    scheduler = ArScheduler(executor.run, 2, 8)
    executor.fault = lambda command: isinstance(command, ar.Encode) and command.patches[0, 0] == 1
    bad, good = (scheduler.submit(ar_request(*seeds, first=seeds[0])) for seeds in ((1, 2), (3,)))
    run_all(scheduler)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(0)
    assert good.result(0).prior_token_ids.shape == (1, 6)
    assert [command.seed for command in executor.of(ar.Admit)] == [3]


class DitExecutor:
    """Keeps the books of the second stage's executor."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.held: set[int] = set()
        self.is_full = False
        self.before: Callable[[Any], None] = lambda _: None

    def run(self, command: Any) -> Any:
        self.commands.append(type(command).__name__)
        if isinstance(command, dit.ForgetSources):
            self.held.discard(command.request)
            return None
        if isinstance(command, dit.ReserveSources):
            if self.is_full and self.held:
                return False
            self.held.add(command.request)
        self.before(command)
        if isinstance(command, dit.Prepare):
            assert command.sources_of is None or command.sources_of in self.held
            return np.linspace(1, 0, command.num_inference_steps + 1, dtype=np.float32)
        return isinstance(command, dit.ReserveSources) if not isinstance(command, dit.ReadSource) else None


SOURCE = SourcePicture(np.zeros((32, 32, 3), np.uint8), np.zeros(1, np.int32), Grid(1, 1))


def request(*seeds: int) -> PaintRequest:
    return PaintRequest(
        "x", np.zeros((len(seeds), 1), np.int32), Grid(1, 1), Size(32, 32), seeds, num_inference_steps=2
    )


def test_sources_are_read_once_and_forgotten_when_all_pictures_are_denoised() -> None:
    executor = DitExecutor()
    DitScheduler(executor.run).denoise(RequestContext(), request(1, 2), (SOURCE,))
    assert executor.commands == [
        "ReserveSources",
        "EncodeSource",
        "ReadSource",
        *["Prepare", "Step", "Step"] * 2,
        "ForgetSources",
    ]
    assert not executor.held


def test_without_sources_nothing_is_read() -> None:
    executor = DitExecutor()
    DitScheduler(executor.run).denoise(RequestContext(), request(1))
    assert executor.commands == ["Prepare", "Step", "Step"]


@pytest.mark.parametrize("kind", [dit.EncodeSource, dit.ReadSource, dit.Prepare, dit.Step])
def test_sources_are_forgotten_after_a_fault(kind: type) -> None:
    executor = DitExecutor()
    scheduler = DitScheduler(executor.run)

    def fail(command: Any) -> None:
        if isinstance(command, kind):
            raise RuntimeError("out of memory")

    executor.before = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        scheduler.denoise(RequestContext(), request(1, 2), (SOURCE,))
    assert not executor.held
    executor.before = lambda _: None
    assert len(scheduler.denoise(RequestContext(), request(3), (SOURCE,))) == 1


def test_sources_are_forgotten_when_the_request_is_cancelled() -> None:
    executor, context = DitExecutor(), RequestContext()
    executor.before = lambda command: context.cancel() if isinstance(command, dit.Step) else None
    with pytest.raises(CancelledError):
        DitScheduler(executor.run).denoise(context, request(1, 2), (SOURCE,))
    assert not executor.held


def test_a_cancelled_request_reads_no_sources() -> None:
    executor, context = DitExecutor(), RequestContext()
    context.cancel()
    with pytest.raises(CancelledError):
        DitScheduler(executor.run).denoise(context, request(1), (SOURCE,))
    assert "ReserveSources" not in executor.commands

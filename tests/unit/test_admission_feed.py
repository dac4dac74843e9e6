"""The first stage on the tiny checkpoint lets sequences in by a painter's word, heard over the real bus."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from glm_image.ar.admission import BatchAdmission
from glm_image.ar.commands import Command, Step
from glm_image.ar.engine import ArEngine, ArSettings
from glm_image.ar.scheduler import Run
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.errors import CancelledError, DeadlineExceededError, UnavailableError
from glm_image.ipc.protocol import Event
from glm_image.ipc.server import IpcServer
from glm_image.ipc.subscriber import Subscriber
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.lifecycle.downstream import TOPIC, DitLoad, DitLoadReporter
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, ResolvedRequest

SLOTS = 4
WAIT_SECONDS = 60
TOKENS = 242 + 2  # preview 11 x 22, picture 1 x 2


@dataclass
class Painter:
    """A painting instance without an engine, on the bus."""

    folder: Path
    name: str = "glm_dit_0"

    def __post_init__(self) -> None:
        self.painting = DitLoadReporter(self.name)
        self.node = IpcServer(self.folder, self.name, {}, lambda topic, listens: self.painting.tell())
        self.painting.publish = self.node.publish

    def begin(self, pictures: int) -> RequestContext:
        context = RequestContext()
        self.painting.begin(context, pictures)
        context.add_seconds("denoise", 1000.0)  # so long that nobody is let in because of the time
        return context


class FirstStage:
    """An engine with gathered admission, the steps it took, and what it heard."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.steps = 0
        self.backlog = DitLoad()
        self.heard = threading.Semaphore(0)
        self.follower = Subscriber(folder, "glm_dit_", TOPIC, self._hear)
        settings = ArSettings(max_num_seqs=SLOTS, max_sequence_tokens=512)
        self.engine = ArEngine(
            Checkpoint.open(checkpoint),
            open_device("cpu"),
            settings,
            watched=self._counted,
            admission=BatchAdmission(self.backlog),
        )
        self.steps = 0

    def _hear(self, statement: Event) -> None:
        self.backlog.hear(statement)
        self.heard.release()

    def _counted(self, run: Run) -> Run:
        def counting(command: Command) -> object:
            self.steps += isinstance(command, Step)
            return run(command)

        return counting  # type: ignore[return-value]

    def hear(self, statements: int = 1) -> None:
        for _ in range(statements):
            assert self.heard.acquire(timeout=WAIT_SECONDS)

    def request(self, seed: int, pictures: int = 1) -> ResolvedRequest:
        asked = GenerationParameters(prompt="x", height=32, width=64, seed=seed, num_images=pictures)
        return asked.resolve(Limits(), self.engine.sampling)

    def close(self) -> None:
        self.engine.close()
        self.follower.close()


@pytest.fixture
def painter(tmp_path: Path) -> Iterator[Painter]:
    made = Painter(tmp_path)
    yield made
    made.node.close()


@pytest.fixture
def first(checkpoint_folder: Path, tmp_path: Path) -> Iterator[FirstStage]:
    made = FirstStage(checkpoint_folder, tmp_path)
    yield made
    made.close()


def test_who_waits_decodes_together_when_the_painter_says_so(first: FirstStage, painter: Painter) -> None:
    alone = [first.engine.submit(RequestContext(), first.request(seed)).result(WAIT_SECONDS) for seed in range(3)]
    assert first.steps == 3 * (TOKENS - 1)
    busy = painter.begin(3)
    first.follower.discover()
    first.hear()
    waiting = [first.engine.submit(RequestContext(), first.request(seed)) for seed in range(3)]
    assert first.backlog.pictures() == 2
    assert not any(future.done() for future in waiting)
    assert first.steps == 3 * (TOKENS - 1)
    busy.add_seconds("denoise", 1000.0)
    for future, expected in zip(waiting, alone, strict=True):
        assert (future.result(WAIT_SECONDS).prior_token_ids == expected.prior_token_ids).all()
    assert first.steps == 4 * (TOKENS - 1)


def test_a_full_batch_and_a_request_of_several_pictures_go_on(first: FirstStage, painter: Painter) -> None:
    painter.begin(9)
    first.follower.discover()
    first.hear()
    more = first.engine.submit(RequestContext(), first.request(0, pictures=SLOTS + 1))
    assert more.result(WAIT_SECONDS).prior_token_ids.shape == (SLOTS + 1, 2)
    assert first.steps == 2 * (TOKENS - 1)


def test_who_waits_can_be_cancelled_run_out_of_time_and_be_told_of_the_end(first: FirstStage, painter: Painter) -> None:
    painter.begin(9)
    first.follower.discover()
    first.hear()
    unwanted = RequestContext()
    cancelled = first.engine.submit(unwanted, first.request(1))
    held = first.engine.submit(RequestContext(), first.request(2))
    unwanted.cancel()
    with pytest.raises(CancelledError):
        cancelled.result(WAIT_SECONDS)
    assert first.steps == 0
    # Too little time to be painted after all that is ahead, so it is not held; the one before it goes first.
    late = first.engine.submit(
        RequestContext(deadline_ns=time.monotonic_ns() + WAIT_SECONDS * NANOSECONDS), first.request(3)
    )
    held.result(WAIT_SECONDS)
    late.result(WAIT_SECONDS)
    with pytest.raises(DeadlineExceededError):
        first.engine.submit(RequestContext(deadline_ns=1), first.request(4)).result(WAIT_SECONDS)
    last = first.engine.submit(RequestContext(), first.request(5))
    first.engine.close()
    with pytest.raises(UnavailableError):
        last.result(0)


def test_a_painter_that_comes_later_or_again_is_heard(first: FirstStage, tmp_path: Path) -> None:
    first.follower.discover()
    assert first.backlog.pictures() is None
    for pictures in (5, 7):
        painter = Painter(tmp_path)
        painter.begin(pictures)
        first.follower.discover()
        while first.backlog.pictures() != pictures - 1:
            first.hear()
        painter.node.close()


def test_nothing_is_published_to_nobody(painter: Painter) -> None:
    told: list[Event] = []
    publish = painter.node.publish
    painter.painting.publish = lambda topic, event: publish(topic, lambda: told.append(event()) or {})
    painter.painting.end(painter.begin(2))
    assert told == []

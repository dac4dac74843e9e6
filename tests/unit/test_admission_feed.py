"""The AR engine on the tiny checkpoint admits sequences by the load of a DiT instance, received over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from glm_image.ar.admission import BatchAdmission
from glm_image.ar.commands import ArCommand, Step
from glm_image.ar.engine import ArEngine, ArSettings
from glm_image.ar.scheduler import Run
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.errors import CancelledError, DeadlineExceededError, UnavailableError
from glm_image.ipc.protocol import Event
from glm_image.ipc.server import IpcServer
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.lifecycle.dit_load import DitLoadFeed, DitLoadReporter
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, ResolvedRequest
from glm_image.request.stages import Stage

SLOTS = 4
WAIT_SECONDS = 60
TOKENS = 242 + 2  # preview 11 x 22, image 1 x 2


@dataclass
class DitInstance:
    """A DiT instance without an engine, with its IPC server."""

    folder: Path
    name: str = "glm_dit_0"

    def __post_init__(self) -> None:
        self.server = IpcServer()
        self.reporter = DitLoadReporter(self.name, self.server.publish)
        self.server.start(self.folder, self.name, {}, lambda topic, is_there: self.reporter.publish_load())

    def begin(self, images: int) -> RequestContext:
        context = RequestContext(num_images=images, observers=(self.reporter,))
        context.start(Stage.CONDITION)
        context.add_seconds(Stage.DENOISE, 1000.0)  # so long that no request is admitted because of its waiting time
        return context


class ArStage:
    """An engine with batch admission, the steps it took, and the statements it received."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.steps = 0
        self.feed = DitLoadFeed(folder)
        self.load = self.feed.load
        self.received = threading.Semaphore(0)
        settings = ArSettings(max_num_seqs=SLOTS, max_sequence_tokens=512, speculation="none")
        self.engine = ArEngine(
            Checkpoint.open(checkpoint),
            open_device("cpu"),
            settings,
            watched=self._counted,
            admission=BatchAdmission(self.load),
        )
        look_again = self.load._on_change
        self.load.when_changed(lambda: (look_again(), self.received.release()))
        self.steps = 0

    def _counted(self, run: Run) -> Run:
        def counting(command: ArCommand[object]) -> object:
            self.steps += isinstance(command, Step)
            return run(command)

        return counting

    def look(self) -> None:
        """Has the feed look for new instances, as a request that starts does."""
        self.feed.started(RequestContext())

    def wait_for_statement(self) -> None:
        assert self.received.acquire(timeout=WAIT_SECONDS)

    def request(self, seed: int, images: int = 1) -> ResolvedRequest:
        parameters = GenerationParameters(prompt="x", height=32, width=64, seed=seed, num_images=images)
        return parameters.resolve(Limits(), self.engine.sampling)

    def close(self) -> None:
        self.engine.close()
        self.feed.close()


@pytest.fixture
def dit(tmp_path: Path) -> Iterator[DitInstance]:
    made = DitInstance(tmp_path)
    yield made
    made.server.close()


@pytest.fixture
def ar(checkpoint_folder: Path, tmp_path: Path) -> Iterator[ArStage]:
    made = ArStage(checkpoint_folder, tmp_path)
    yield made
    made.close()


def test_waiting_requests_decode_together_when_the_dit_is_nearly_done(ar: ArStage, dit: DitInstance) -> None:
    alone = [ar.engine.submit(RequestContext(), ar.request(seed)).result(WAIT_SECONDS) for seed in range(3)]
    assert ar.steps == 3 * (TOKENS - 1)
    busy = dit.begin(3)
    ar.look()
    ar.wait_for_statement()
    waiting = [ar.engine.submit(RequestContext(), ar.request(seed)) for seed in range(3)]
    assert ar.load.images() == 2
    assert not any(future.done() for future in waiting)
    assert ar.steps == 3 * (TOKENS - 1)
    busy.add_seconds(Stage.DENOISE, 1000.0)
    for future, expected in zip(waiting, alone, strict=True):
        assert (future.result(WAIT_SECONDS).prior_token_ids == expected.prior_token_ids).all()
    assert ar.steps == 4 * (TOKENS - 1)


def test_a_full_batch_and_a_request_of_several_images_are_admitted(ar: ArStage, dit: DitInstance) -> None:
    dit.begin(9)
    ar.look()
    ar.wait_for_statement()
    more = ar.engine.submit(RequestContext(), ar.request(0, images=SLOTS + 1))
    assert more.result(WAIT_SECONDS).prior_token_ids.shape == (SLOTS + 1, 2)
    assert ar.steps == 2 * (TOKENS - 1)


def test_a_waiting_request_can_be_cancelled_miss_its_deadline_and_end_with_the_engine(
    ar: ArStage, dit: DitInstance
) -> None:
    dit.begin(9)
    ar.look()
    ar.wait_for_statement()
    unwanted = RequestContext()
    cancelled = ar.engine.submit(unwanted, ar.request(1))
    held = ar.engine.submit(RequestContext(), ar.request(2))
    unwanted.cancel()
    with pytest.raises(CancelledError):
        cancelled.result(WAIT_SECONDS)
    assert ar.steps == 0
    # Too little time to be painted after all that is ahead, so it is not held; the one before it goes first.
    late = ar.engine.submit(RequestContext(deadline_ns=time.monotonic_ns() + WAIT_SECONDS * NANOSECONDS), ar.request(3))
    held.result(WAIT_SECONDS)
    late.result(WAIT_SECONDS)
    with pytest.raises(DeadlineExceededError):
        ar.engine.submit(RequestContext(deadline_ns=1), ar.request(4)).result(WAIT_SECONDS)
    last = ar.engine.submit(RequestContext(), ar.request(5))
    ar.engine.close()
    with pytest.raises(UnavailableError):
        last.result(0)


def test_an_instance_that_starts_later_or_again_is_received(ar: ArStage, tmp_path: Path) -> None:
    ar.look()
    assert ar.load.images() is None
    for images in (5, 7):
        dit = DitInstance(tmp_path)
        dit.begin(images)
        ar.look()
        while ar.load.images() != images - 1:
            ar.wait_for_statement()
        dit.server.close()


def test_publish_without_subscriber_builds_no_statement(dit: DitInstance) -> None:
    built: list[Event] = []
    publish = dit.server.publish
    dit.reporter.publish = lambda topic, event: publish(topic, lambda: built.append(event()) or {})
    dit.begin(2).finish()
    assert built == []

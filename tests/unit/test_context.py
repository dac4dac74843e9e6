from __future__ import annotations

import itertools
import logging
import time
from typing import Any

import numpy as np
import pytest

from glm_image.errors import CancelledError, DeadlineExceededError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext, RequestObserver
from glm_image.request.stages import Stage


class Recorder(RequestObserver):
    """Notes all that it is called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def started(self, context: RequestContext) -> None:
        self.calls.append("started")

    def progressed(self, context: RequestContext, progress: Progress) -> None:
        self.calls.append(progress)

    def stage_finished(self, context: RequestContext, stage: Stage, seconds: float) -> None:
        self.calls.append((stage, seconds))

    def preview_sampled(self, context: RequestContext, tokens: Any) -> None:
        self.calls.append(("preview", tokens.tolist()))

    def latent_preview_rendered(self, context: RequestContext, pixels: Any) -> None:
        self.calls.append(("latent_preview", pixels.shape))

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        self.calls.append(("finished", error))


class Faulty(RequestObserver):
    """Raises whenever it is called."""

    def _fail(self, *_: Any) -> None:
        raise RuntimeError("a faulty observer")

    started = progressed = stage_finished = preview_sampled = latent_preview_rendered = finished = _fail


class Canceller(RequestObserver):
    """Cancels the request when it starts."""

    def started(self, context: RequestContext) -> None:
        context.cancel()


ERROR = ValueError()
EVERY_CALL = [
    "started",
    Progress(Stage.AR_QUEUE, 0, 1),
    Progress(Stage.DECODE, 3, 8),
    (Stage.DECODE, 1.5),
    ("preview", [1, 2]),
    ("latent_preview", (2, 3, 3)),
    ("finished", ERROR),
]


def run_through(context: RequestContext) -> None:
    context.start(Stage.AR_QUEUE)
    context.report(Stage.DECODE, 3, 8)
    context.add_seconds(Stage.DECODE, 1.5)
    for _ in range(2):
        context.publish_preview(np.array([1, 2], dtype=np.int32))
    context.publish_latent_preview(np.zeros((2, 3, 3), dtype=np.uint8))
    context.finish(ERROR)
    context.finish(None)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_each_observer_sees_every_event_in_any_order_and_despite_a_faulty_one(
    order: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Recorder(), Recorder()
    observers = (first, Faulty(), second)
    with caplog.at_level(logging.ERROR):
        run_through(RequestContext(observers=tuple(observers[index] for index in order)))
    assert first.calls == second.calls == EVERY_CALL
    assert [record.message.partition(" request ")[0] for record in caplog.records] == (
        ["Faulty failed to observe"] * len(EVERY_CALL)
    )


def test_an_observer_can_be_added_and_removed() -> None:
    context, recorder = RequestContext(), Recorder()
    assert (context.is_watched, context.wants_preview) == (False, False)
    context.add_observer(recorder)
    assert (context.is_watched, context.wants_preview) == (True, True)
    context.publish_preview(np.zeros(0, dtype=np.int32))
    assert not context.wants_preview
    context.remove_observer(recorder)
    context.remove_observer(recorder)
    assert not context.is_watched
    context.report(Stage.DECODE, 1, 2)
    assert recorder.calls == [("preview", [])]
    assert context.progress() == Progress(Stage.DECODE, 1, 2)


def test_progress_is_not_computed_without_an_observer_of_it() -> None:
    context = RequestContext(observers=(Canceller(),))
    context.progress = lambda: pytest.fail("progress that no observer receives")
    context.publish_progress()
    context.add_observer(ProgressCallback(lambda _: None))
    with pytest.raises(pytest.fail.Exception):
        context.publish_progress()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_request_cancelled_by_an_observer_does_not_start(is_first: bool) -> None:
    recorder, canceller = Recorder(), Canceller()
    context = RequestContext(observers=(canceller, recorder) if is_first else (recorder, canceller))
    with pytest.raises(CancelledError):
        context.start(Stage.CONDITION)
    assert recorder.calls == ["started", Progress(Stage.CONDITION, 0, 1)]


def test_a_request_goes_on_until_it_is_cancelled() -> None:
    context = RequestContext(id="mine")
    context.check()
    context.cancel()
    with pytest.raises(CancelledError, match="mine"):
        context.check()


def test_cancel_calls_the_callback_even_if_it_is_set_later() -> None:
    context, called = RequestContext(), list[str]()
    context.on_cancel(lambda: called.append("first"))
    context.cancel()
    context.on_cancel(lambda: called.append("too late"))
    assert called == ["first", "too late"]
    with pytest.raises(CancelledError):
        context.check()


def test_a_timeout_becomes_a_deadline() -> None:
    before = time.monotonic_ns()
    context = RequestContext.with_timeout("mine", 5_000_000)
    assert before + 5 * 10**9 <= context.deadline_ns <= time.monotonic_ns() + 5 * 10**9
    context.check()
    context.deadline_ns = time.monotonic_ns() - 1
    with pytest.raises(DeadlineExceededError, match="mine"):
        context.check()


def test_a_deadline_that_cannot_be_met_names_the_missing_time() -> None:
    context = RequestContext.with_timeout("mine", 2_000_000)
    context.check(1.0)
    with pytest.raises(
        DeadlineExceededError, match=r"at least 5\.000 s, (1\.9|2\.0)\d+ s are left, 3\.0\d+ s too few$"
    ):
        context.check(5.0)
    RequestContext().check(1e9)


def test_without_timeout_there_is_no_deadline_and_without_id_a_new_one() -> None:
    contexts = [RequestContext.with_timeout("", 0) for _ in range(2)]
    assert [context.deadline_ns for context in contexts] == [0, 0]
    assert contexts[0].id != contexts[1].id
    assert all(context.id for context in contexts)
    contexts[0].check()


def test_seconds_add_up_and_are_kept_when_a_stage_fails() -> None:
    context = RequestContext()
    context.add_seconds(Stage.DECODE, 1.5)
    context.add_seconds(Stage.DECODE, 0.25)
    with pytest.raises(RuntimeError), context.timed(Stage.VAE):
        raise RuntimeError
    assert context.seconds[Stage.DECODE] == 1.75
    assert context.seconds[Stage.VAE] >= 0

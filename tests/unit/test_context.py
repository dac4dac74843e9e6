from __future__ import annotations

import time

import pytest

from glm_image.errors import CancelledError, DeadlineExceededError
from glm_image.lifecycle.context import Progress, RequestContext


def test_a_job_goes_on_until_it_is_cancelled() -> None:
    context = RequestContext(id="mine")
    context.check()
    context.cancel()
    with pytest.raises(CancelledError, match="mine"):
        context.check()


def test_a_timeout_becomes_a_deadline() -> None:
    before = time.monotonic_ns()
    context = RequestContext.with_timeout("mine", 5_000_000)
    assert before + 5 * 10**9 <= context.deadline_ns <= time.monotonic_ns() + 5 * 10**9
    context.check()
    context.deadline_ns = time.monotonic_ns() - 1
    with pytest.raises(DeadlineExceededError, match="mine"):
        context.check()


def test_no_timeout_is_no_deadline_and_no_id_is_a_new_one() -> None:
    contexts = [RequestContext.with_timeout("", 0) for _ in range(2)]
    assert [context.deadline_ns for context in contexts] == [0, 0]
    assert contexts[0].id != contexts[1].id
    assert all(context.id for context in contexts)
    contexts[0].check()


def test_seconds_add_up_and_are_kept_when_a_stage_fails() -> None:
    context = RequestContext()
    context.add_seconds("decode", 1.5)
    context.add_seconds("decode", 0.25)
    with pytest.raises(RuntimeError), context.timed("vae"):
        raise RuntimeError
    assert context.seconds["decode"] == 1.75
    assert context.seconds["vae"] >= 0


def test_progress_reaches_the_sink() -> None:
    seen: list[Progress] = []
    RequestContext(on_progress=seen.append).report("tokens", 3, 8)
    assert seen == [Progress("tokens", 3, 8)]

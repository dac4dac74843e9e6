"""The bytes of a stage's requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_image.errors import InvalidInputError, QueueFullError
from glm_image.lifecycle.byte_budget import ByteBudget
from glm_image.lifecycle.context import RequestContext

MB = 1_000_000


def test_bytes_are_held_until_the_request_ends() -> None:
    budget = ByteBudget("glm_ar", 100 * MB)
    first, second = (RequestContext(observers=(budget,)) for _ in range(2))
    budget.hold(first, "image", 58 * MB)
    budget.hold(first, "image", 2 * MB)
    with pytest.raises(
        QueueFullError,
        match=r"^glm_ar holds 60 MB of requests, and this one of 41 MB would exceed the 100 MB of max_queue_bytes",
    ):
        budget.hold(second, "image", 41 * MB)
    second.finish(QueueFullError("full"))
    assert budget.held == 60 * MB
    first.finish()
    assert budget.held == 0


def test_request_that_never_fits_is_invalid() -> None:
    budget, context = ByteBudget("glm_ar", 100), RequestContext()
    budget.hold(context, "image", 60)
    with pytest.raises(InvalidInputError, match=r"^image is 101 bytes in all; allowed: at most 100 \(max_queue_"):
        budget.hold(context, "image", 41)
    assert budget.held == 60


def test_bytes_elsewhere_count() -> None:
    waiting = [90]
    budget = ByteBudget("glm_ar", 100, lambda: waiting[0])
    with pytest.raises(QueueFullError):
        budget.hold(RequestContext(), "image", 11)
    waiting[0] = 0
    budget.hold(RequestContext(), "image", 11)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 150) | st.none()), max_size=60))
def test_never_holds_more_than_it_may(actions: list[tuple[int, int | None]]) -> None:
    budget, held = ByteBudget("glm_ar", 300), dict[int, int]()
    contexts = [RequestContext(observers=(budget,)) for _ in range(6)]
    for number, size in actions:
        if size is None:
            contexts[number].finish()
            held.pop(number, None)
            contexts[number] = RequestContext(observers=(budget,))
            continue
        try:
            budget.hold(contexts[number], "image", size)
        except (QueueFullError, InvalidInputError):
            assert sum(held.values()) + size > 300
        else:
            held[number] = held.get(number, 0) + size
        assert budget.held == sum(held.values()) <= 300

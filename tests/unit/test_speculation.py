from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_image.ar.commands import Admit, Advance, Advanced, ArCommand, Discard, Peek, Release
from glm_image.ar.metrics import ACCEPTED_TOKENS, TOKENS
from glm_image.ar.scheduler import Scheduler
from glm_image.ar.sequence import Request
from glm_image.ar.settings import ArSettings, captured_rows
from glm_image.ar.speculation import HOST_ROW_COST, MAX_ROWS, ROW_COST, WindowPolicy, row_counts, rows_for
from glm_image.errors import CancelledError, ConfigurationError
from glm_image.lifecycle.context import RequestContext, RequestObserver
from glm_image.request.declaration import read
from glm_image.request.geometry import Grid
from glm_image.request.parameters import GenerationParameters, ResolvedRequest, Sampling

SLOTS = 3
PREVIEW = 4


def test_row_counts_have_a_row_for_every_slot() -> None:
    assert row_counts(1, 16, is_host=False) == (16,)
    assert row_counts(8, 8, is_host=False) == (16, 32, 64)
    assert row_counts(8, 16, is_host=False) == row_counts(8, 32, is_host=False) == (16, 32, 64, 128)
    assert row_counts(200, 2, is_host=False) == (16, 32, 64, 128, 200)
    assert row_counts(1, 16, is_host=True) == (8, 16)
    assert row_counts(8, 32, is_host=True) == tuple(range(8, 129, 8))
    assert row_counts(8, 16, is_host=False, captured=(64, 8)) == (8, 64)
    assert [rows_for(needed, (16, 64)) for needed in (1, 16, 17, 64)] == [16, 16, 64, 64]


def test_speculation_is_automatic_on_the_cpu_alone() -> None:
    assert captured_rows(ArSettings(), is_host=True)
    assert captured_rows(ArSettings(), is_host=False) == ()
    assert captured_rows(ArSettings(speculation="none"), is_host=True) == ()
    assert captured_rows(ArSettings(speculation="jacobi", max_num_seqs=4), is_host=False) == (16, 32, 64)
    int8 = ArSettings(speculation="jacobi", quantization="int8")
    assert captured_rows(int8, is_host=False) == (16, 32, 64)
    assert captured_rows(int8, is_host=True)[-1] == MAX_ROWS


@pytest.mark.parametrize(
    ("given_text", "error"),
    [
        ({"speculation": "lookahead"}, r"^speculation is 'lookahead'; allowed: auto, none, jacobi$"),
        ({"speculation_window": "1"}, r"^speculation_window is '1'; allowed: a whole number from 2 to 32$"),
        ({"speculation_window": "33"}, r"^speculation_window is '33'; allowed: a whole number from 2 to 32$"),
    ],
)
def test_refused_parameters(given_text: dict[str, str], error: str) -> None:
    with pytest.raises(ConfigurationError, match=error):
        read(ArSettings, given_text)


@pytest.mark.parametrize("sizes", [(0, 16), (7,), (16, 129)])
def test_refused_row_counts(sizes: tuple[int, ...]) -> None:
    settings = ArSettings(speculation="jacobi", graph_capture_sizes=sizes)
    with pytest.raises(ConfigurationError, match=r"^graph_capture_sizes is '.*'; allowed .* from 1 to 128, .*least 8"):
        captured_rows(settings, is_host=False)


def policy(slots: int, window: int = 16, *, is_host: bool = False) -> WindowPolicy:
    made = WindowPolicy(window, row_counts(slots, window, is_host=is_host), HOST_ROW_COST if is_host else ROW_COST)
    for slot in range(slots):
        made.begin(slot)
    return made


def test_wrong_guesses_shrink_a_window_and_right_ones_widen_it_again() -> None:
    made = policy(8)
    left = dict.fromkeys(range(8), 500)
    assert min(made.widths(left).values()) > 8
    for _ in range(40):
        for slot, width in made.widths(left).items():
            made.observe(Advanced(slot, width, 1 if slot == 3 else width))
    widths = made.widths(left)
    assert 1 < widths[3] < 4
    assert widths[0] == 16
    for _ in range(40):
        for slot, width in made.widths(left).items():
            made.observe(Advanced(slot, width, width))
    assert made.widths(left)[3] > 8


def test_steps_have_few_rows_where_nothing_is_accepted() -> None:
    for slots, most in ((1, 16), (8, 16)):
        made = policy(slots)
        left = dict.fromkeys(range(slots), 500)
        for _ in range(40):
            for slot, width in made.widths(left).items():
                made.observe(Advanced(slot, width, 1))
        assert sum(made.widths(left).values()) <= most


@settings(max_examples=200, deadline=None)
@given(
    slots=st.integers(1, 140),
    window=st.integers(2, 32),
    is_host=st.booleans(),
    steps=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 32)), min_size=1, max_size=140),
)
def test_rows_stay_within_the_bounds(slots: int, window: int, is_host: bool, steps: list[tuple[int, int]]) -> None:
    made = policy(slots, window, is_host=is_host)
    left = {slot: steps[slot % len(steps)][0] for slot in range(slots)}
    for _ in range(3):
        widths = made.widths(left)
        assert widths.keys() == left.keys()
        assert all(1 <= width <= min(window, left[slot]) for slot, width in widths.items())
        assert sum(widths.values()) <= max(128, -(-slots // 8) * 8)
        for slot, width in widths.items():
            made.observe(Advanced(slot, width, max(1, min(width, steps[slot % len(steps)][1]))))


class Executor:
    """Keeps the books of an executor whose steps report ``lag`` steps late; token i is 1000 * seed + i."""

    def __init__(self, lag: int) -> None:
        self.commands: list[ArCommand[Any]] = []
        self._lag = lag
        self._sequences: dict[int, list[int]] = {}
        self._late: deque[list[tuple[list[int], Advanced]]] = deque()

    def run(self, command: ArCommand[Any]) -> Any:
        self.commands.append(command)
        match command:
            case Admit(slot):
                assert slot not in self._sequences
                self._sequences[slot] = [command.seed, 1, command.tokens]
            case Advance(widths):
                return self._advance(dict(widths))
            case Peek(slot, count):
                seed, sampled, _ = self._sequences[slot]
                assert count <= sampled
                return np.arange(1000 * seed, 1000 * seed + count, dtype=np.int32)
            case Release(slot):
                seed, sampled, total = self._sequences.pop(slot)
                assert sampled == total
                return np.arange(1000 * seed, 1000 * seed + sampled, dtype=np.int32)
            case Discard(slot):
                self._sequences.pop(slot, None)
        return None

    def _advance(self, widths: dict[int, int]) -> tuple[Advanced, ...]:
        assert widths.keys() == self._sequences.keys()
        step = []
        for slot, width in widths.items():
            sequence = self._sequences[slot]
            seed, sampled, total = sequence
            accepted = min(width, 1 + (7 * seed + 3 * sampled) % 5, total - sampled)
            sequence[1] += accepted
            if accepted:
                step.append((sequence, Advanced(slot, width, accepted)))
        self._late.append(step)
        if len(self._late) <= self._lag:
            return ()
        return tuple(found for sequence, found in self._late.popleft() if self._sequences.get(found.slot) is sequence)


class Served:
    def __init__(self, lag: int) -> None:
        self.executor, self.recorded = Executor(lag), list[tuple[Any, float]]()
        self.scheduler = Scheduler(self.executor.run, SLOTS, 100, self._record, windows=policy(SLOTS))

    def _record(self, metric: Any, value: float) -> None:
        self.recorded.append((metric, value))

    def submit(self, *seeds: int, context: RequestContext | None = None, length: int = 30) -> Any:
        resolved = ResolvedRequest(
            parameters=GenerationParameters(prompt="x"),
            requested=(32, 32),  # type: ignore[arg-type]
            grids=(Grid(1, PREVIEW), Grid(1, length - PREVIEW)),
            sampling=Sampling(1.0, 1.0, 1),
            seeds=seeds,
        )
        return self.scheduler.submit(Request(context or RequestContext(), (1, 2), resolved))

    def run(self) -> None:
        while not self.scheduler.next_wait():
            self.scheduler.step()

    def steps(self) -> int:
        return sum(isinstance(command, Advance) for command in self.executor.commands)


def expected(seeds: tuple[int, ...], length: int) -> list[list[int]]:
    return [list(range(1000 * seed + PREVIEW, 1000 * seed + length)) for seed in seeds]


@settings(max_examples=100, deadline=None)
@given(
    lag=st.integers(0, 2),
    requests=st.lists(
        st.tuples(st.integers(PREVIEW + 1, 60), st.integers(1, 4), st.none() | st.integers(0, 20), st.integers(0, 9)),
        min_size=1,
        max_size=10,
    ),
)
def test_every_request_gets_its_own_tokens_whatever_is_cancelled(
    lag: int, requests: list[tuple[int, int, int | None, int]]
) -> None:
    served = Served(lag)
    submitted = []
    for number, (length, images, cancel_after, steps_before) in enumerate(requests):
        for _ in range(steps_before):
            served.scheduler.step()
        seeds, context = tuple(range(50 * number, 50 * number + images)), RequestContext()
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
            assert future.result(0).prior_token_ids.tolist() == expected(seeds, length)
            assert all(1 <= steps <= length - 1 for steps in future.result(0).steps)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_finished_sequence_costs_at_most_the_steps_under_way(lag: int) -> None:
    served = Served(lag)
    future = served.submit(4, length=60)
    served.run()
    (steps,) = future.result(0).steps
    assert steps <= served.steps() <= steps + lag
    assert steps < 59


def test_progress_and_metrics_count_accepted_tokens() -> None:
    served, context = Served(1), RequestContext()
    future = served.submit(4, 5, context=context)
    done = []
    while not served.scheduler.next_wait():
        served.scheduler.step()
        if context.progress is not None:
            done.append(context.progress().done)
    assert done == sorted(done)
    assert done[-1] == 60
    accepted = [value for metric, value in served.recorded if metric is ACCEPTED_TOKENS]
    assert sum(accepted) == 2 * 29
    assert len(accepted) == sum(future.result(0).steps)
    assert sum(value for metric, value in served.recorded if metric is TOKENS) == 60


class PreviewObserver(RequestObserver):
    def __init__(self) -> None:
        self.previews: list[list[int]] = []

    def preview_sampled(self, context: RequestContext, tokens: Any) -> None:
        self.previews.append(tokens.tolist())


@pytest.mark.parametrize("lag", [0, 1])
def test_preview_is_published_once(lag: int) -> None:
    served, observer = Served(lag), PreviewObserver()
    served.submit(7, 8, context=RequestContext(observers=(observer,)))
    served.run()
    assert observer.previews == [[7000 + index for index in range(PREVIEW)]]

"""Jacobi decoding gives the tokens of one-by-one decoding, whatever is guessed and whatever else is in flight."""

from __future__ import annotations

from concurrent.futures import Future
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glm_image.ar.commands import Admit, Advance, ArCommand, Discard, Peek, Release
from glm_image.ar.engine import ArEngine, ArResult
from glm_image.ar.scheduler import Scheduler
from glm_image.ar.sequence import Request
from glm_image.ar.settings import ArSettings
from glm_image.ar.speculation import ROW_COST, WindowPolicy, row_counts
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.attention import masked_decode_attention, masked_window_attention
from glm_image.devices.cpu import CpuDevice
from glm_image.devices.open import open_device
from glm_image.errors import UnavailableError
from glm_image.lifecycle.context import RequestContext
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters
from helpers import FaultyExecutor, MakeCheckpoint, OpenExecutor
from pictures import encoded, picture

WINDOW = 32
WAIT_SECONDS = 120
SIZES = [(128, 128), (32, 32), (64, 256), (96, 160), (32, 256), (160, 64)]
SAMPLINGS = [{}, {"temperature": 2.0, "top_p": 1.0}, {"top_k": 5}]
REQUESTS = [
    GenerationParameters(
        prompt="a fox " * (1 + 5 * (index % 3)),
        height=SIZES[index % len(SIZES)][0],
        width=SIZES[index % len(SIZES)][1],
        seed=100 + index,
        **SAMPLINGS[index % len(SAMPLINGS)],
    )
    for index in range(6)
]

Tokens = NDArray[np.int32]


class QueuedDevice(CpuDevice):
    """A CPU that is used as an accelerator: steps are known a step late, attention reads the whole cache."""

    is_host = False

    def step_rows(self, slots: int) -> int:
        return slots

    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return masked_decode_attention(query, keys, values, lengths)

    def window_attention(self, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        return masked_window_attention(query, keys, values, slots, lengths)


QUEUED = QueuedDevice(torch.device("cpu"))


def right_guesses(opened: OpenExecutor, slot: int, tokens: Tokens, share: float, random: Random) -> None:
    """Makes a share of a slot's later guesses right, in place of those of the engine."""
    state = opened.executor.state
    sampled = int(state.sampled[slot])
    for index in range(sampled, len(tokens)):
        state.output[slot, index] = int(tokens[index]) if random.random() < share else 0
    opened.executor.jacobi.window.known[slot] = len(tokens)  # type: ignore[union-attr]


def run_together(
    opened: OpenExecutor, arrivals: list[tuple[int, int]], slots: int, want: dict[int, Tokens], share: float, seed: int
) -> tuple[dict[int, Tokens], int]:
    """Drives an executor as a scheduler does, with windows of random widths; arrivals are (step, request).

    Returns the tokens by request, and the number of steps.
    """
    random, now = Random(seed), 0
    waiting, running, left, done = list(arrivals), dict[int, int](), dict[int, int](), dict[int, Tokens]()
    while waiting or running:
        for slot in [slot for slot in running if not left[slot]]:
            done[running.pop(slot)] = opened.release(slot)
        for slot in reversed(range(slots)):
            if slot not in running and waiting and waiting[0][0] <= now:
                running[slot] = index = waiting.pop(0)[1]
                command = opened.admit(slot, REQUESTS[index])
                opened.run(command)
                left[slot] = command.tokens - 1
        busy = [slot for slot in running if left[slot]]
        if busy:
            for slot in busy:
                if share >= 0:
                    right_guesses(opened, slot, want[running[slot]], share, random)
            widths = {slot: random.randint(1, min(left[slot], WINDOW, 128 // len(busy))) for slot in busy}
            for step in opened.run(Advance(tuple(widths.items()))):
                left[step.slot] -= step.accepted
        now += 1
    return done, now


@pytest.fixture(scope="module")
def want(make_checkpoint: MakeCheckpoint) -> dict[int, Tokens]:
    opened = OpenExecutor(make_checkpoint())
    return {index: opened.alone(opened.admit(0, request)) for index, request in enumerate(REQUESTS)}


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(-1, id="own guesses"),
        pytest.param(0, id="none right", marks=pytest.mark.full),
        pytest.param(0.5, id="half", marks=pytest.mark.full),
        pytest.param(0.9, id="most", marks=pytest.mark.full),
        pytest.param(1, id="all right"),
    ],
)
def test_tokens_are_those_of_one_by_one_decoding(
    make_checkpoint: MakeCheckpoint, want: dict[int, Tokens], share: float
) -> None:
    opened = OpenExecutor(make_checkpoint(), row_counts=row_counts(8, WINDOW, is_host=True))
    arrivals = [(0, 0), (0, 1), (2, 2), (5, 3), (9, 4), (9, 5)]
    done, steps = run_together(opened, arrivals, 4, want, share, seed=1)
    assert {index: tokens.tolist() for index, tokens in done.items()} == {
        index: tokens.tolist() for index, tokens in want.items()
    }
    if share == 1:
        assert steps < max(len(tokens) for tokens in want.values()) / 3


@pytest.mark.parametrize(
    "slots", [1, pytest.param(3, marks=pytest.mark.full), pytest.param(8, marks=pytest.mark.full), 9]
)
def test_number_of_slots_does_not_matter(make_checkpoint: MakeCheckpoint, want: dict[int, Tokens], slots: int) -> None:
    folder = make_checkpoint()
    plain = OpenExecutor(folder, slots)
    assert plain.alone(plain.admit(slots - 1, REQUESTS[3])).tolist() == want[3].tolist()
    opened = OpenExecutor(folder, slots, row_counts=row_counts(slots, WINDOW, is_host=True))
    done, _ = run_together(opened, [(0, 1), (0, 3)], slots, want, 0.7, seed=2)
    assert done[3].tolist() == want[3].tolist()


@pytest.mark.parametrize("slots", [2, pytest.param(8, marks=pytest.mark.full)])
def test_steps_known_late_give_the_same_tokens(
    make_checkpoint: MakeCheckpoint, want: dict[int, Tokens], slots: int
) -> None:
    folder = make_checkpoint()
    plain = OpenExecutor(folder, slots, device=QUEUED)
    exact = {index: plain.alone(plain.admit(0, REQUESTS[index])) for index in (1, 2, 3, 5)}
    opened = OpenExecutor(folder, slots, device=QUEUED, row_counts=row_counts(slots, WINDOW, is_host=False))
    done, _ = run_together(opened, [(0, 1), (0, 2), (3, 3), (4, 5)], 2, exact, 0.7, seed=3)
    assert {index: tokens.tolist() for index, tokens in done.items()} == {
        index: tokens.tolist() for index, tokens in exact.items()
    }


def test_int8_weights_give_the_same_tokens(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    plain = OpenExecutor(folder, int8=True)
    exact = {3: plain.alone(plain.admit(0, REQUESTS[3]))}
    opened = OpenExecutor(folder, row_counts=row_counts(8, WINDOW, is_host=True), int8=True)
    done, _ = run_together(opened, [(0, 3)], 1, exact, 0.7, seed=4)
    assert done[3].tolist() == exact[3].tolist()


def test_slot_given_up_within_a_window_is_free(make_checkpoint: MakeCheckpoint, want: dict[int, Tokens]) -> None:
    opened = OpenExecutor(make_checkpoint(), 2, device=QUEUED, row_counts=(16, 32))
    plain = OpenExecutor(make_checkpoint(), 2, device=QUEUED)
    exact = plain.alone(plain.admit(0, REQUESTS[4]))
    opened.run(opened.admit(0, REQUESTS[0]))
    for _ in range(3):
        opened.run(Advance(((0, 16),)))
    opened.run(Discard(0))
    done, _ = run_together(opened, [(0, 4)], 1, {4: exact}, 0.7, seed=5)
    assert done[4].tolist() == exact.tolist()


def test_preview_is_readable_as_soon_as_it_is_accepted(
    make_checkpoint: MakeCheckpoint, want: dict[int, Tokens]
) -> None:
    opened = OpenExecutor(make_checkpoint(), row_counts=(8, 16, 32))
    command = opened.admit(0, REQUESTS[0])
    opened.run(command)
    sampled = 1
    while sampled < command.grids[0].tokens:
        right_guesses(opened, 0, want[0], 0.9, Random(sampled))
        sampled += sum(step.accepted for step in opened.run(Advance(((0, WINDOW),))))
    assert opened.run(Peek(0, command.grids[0].tokens)).tolist() == want[0][: command.grids[0].tokens].tolist()
    opened.run(Discard(0))


def test_closed_executor_refuses_windows(make_checkpoint: MakeCheckpoint) -> None:
    opened = OpenExecutor(make_checkpoint(), 1, row_counts=(8,))
    opened.executor.close()
    with pytest.raises(UnavailableError, match="closed"):
        opened.run(Advance(((0, 1),)))


def test_a_row_has_the_same_bits_at_every_row_count_and_place() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, k in ((512, 256), (256, 640), (2064, 256), (48, 32)):
        weight, rows = torch.randn(n, k, generator=generator), torch.randn(128, k, generator=generator)
        want = F.linear(rows[:8], weight)
        for count in range(8, 129, 8):
            for shift in range(0, min(count, 24) - 7):
                placed = torch.roll(rows[:count], shift, dims=0)
                assert torch.equal(F.linear(placed, weight)[shift : shift + 8], want), f"{n} x {k}, {count} rows"


def decoded(engine: ArEngine, requests: list[GenerationParameters]) -> list[ArResult]:
    futures: list[Future[ArResult]] = []
    for request in requests:
        resolved = request.resolve(Limits(), engine.sampling, engine.source_rule)
        futures.append(engine.submit(RequestContext(), resolved))
    return [future.result(WAIT_SECONDS) for future in futures]


def test_engine_gives_the_same_tokens_in_fewer_steps(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint, source = Checkpoint.open(make_checkpoint()), encoded(picture(512, 512))
    requests = [
        GenerationParameters(prompt="a fox", height=64, width=96, seed=3, num_images=3),
        GenerationParameters(prompt="a fox, blue", height=64, width=64, seed=4, images=(source,)),
    ]
    results = []
    for speculation in ("none", "jacobi"):
        settings = ArSettings(speculation=speculation, max_num_seqs=3, max_sequence_tokens=1024)
        engine = ArEngine(checkpoint, open_device("cpu"), settings)
        results.append(decoded(engine, requests))
        engine.close()
    for plain, jacobi in zip(*results, strict=True):
        assert jacobi.prior_token_ids.tolist() == plain.prior_token_ids.tolist()
        assert set(plain.steps) == {plain.tokens["preview"] + plain.tokens["image"] - 1}
        assert all(few <= many for few, many in zip(jacobi.steps, plain.steps, strict=True))


@pytest.mark.parametrize("fail_at", [Admit, Advance, Release])
def test_after_a_fault_the_same_slots_give_the_same_tokens(
    make_checkpoint: MakeCheckpoint, want: dict[int, Tokens], fail_at: type[ArCommand[Any]]
) -> None:
    counts = row_counts(2, WINDOW, is_host=True)
    opened = OpenExecutor(make_checkpoint(), 2, row_counts=counts)
    scheduler = Scheduler(FaultyExecutor(opened, fail_at).run, 2, 8, windows=WindowPolicy(WINDOW, counts, ROW_COST))

    def submit(index: int) -> Request:
        parameters = REQUESTS[index]
        ids = opened.admit(0, parameters).prompt_ids
        request = Request(RequestContext(), ids, parameters.resolve(Limits(), opened.config.sampling))
        scheduler.submit(request)
        return request

    def run() -> None:
        while not scheduler.next_wait():
            scheduler.step()

    failed = submit(1)
    run()
    with pytest.raises(RuntimeError, match=f"{fail_at.__name__} failed"):
        failed.future.result(0)
    requests = {index: submit(index) for index in (1, 3)}
    run()
    for index, request in requests.items():
        assert request.tokens[0].tolist() == want[index].tolist()

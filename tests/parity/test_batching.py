"""The same request gives the same tokens, whatever other requests are in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.ar.commands import Admit, ArCommand, Discard, Release, Step
from glm_image.ar.engine import ArEngine, ArResult
from glm_image.ar.scheduler import Scheduler
from glm_image.ar.sequence import Request
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.attention import masked_decode_attention
from glm_image.devices.cpu import CpuDevice
from glm_image.devices.open import open_device
from glm_image.errors import CancelledError, DeadlineExceededError, UnavailableError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, ResolvedRequest
from helpers import FaultyExecutor, MakeCheckpoint, OpenExecutor
from parity.reference import reference_tokens

SIZES = [(256, 256), (32, 32), (64, 256), (256, 64), (96, 160), (128, 128), (32, 256), (160, 64)]
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 2.0, "top_p": 1.0}, {"top_k": 5}, {}]
REQUESTS = [
    GenerationParameters(
        prompt="a fox " * (1 + 5 * (index % 3)),
        height=SIZES[index % len(SIZES)][0],
        width=SIZES[index % len(SIZES)][1],
        seed=100 + index,
        **SAMPLINGS[index % len(SAMPLINGS)],
    )
    for index in range(12)
]
WAIT_SECONDS = 120

Tokens = NDArray[np.int32]


@pytest.fixture(scope="module")
def opened(make_checkpoint: MakeCheckpoint) -> OpenExecutor:
    return OpenExecutor(make_checkpoint())


@pytest.fixture(scope="module")
def alone(opened: OpenExecutor) -> list[Tokens]:
    """Each request's tokens, decoded without any other."""
    return [opened.alone(opened.admit(0, parameters)) for parameters in REQUESTS]


def test_tokens_match_the_reference(alone: list[Tokens], reference: Any) -> None:
    for parameters, tokens in zip(REQUESTS[:4], alone, strict=False):
        names = [name for name in ("temperature", "top_p", "top_k") if getattr(parameters, name) is not None]
        sampling = {name: getattr(parameters, name) for name in names}
        size = parameters.height, parameters.width
        theirs = reference_tokens(reference, parameters.prompt, *size, parameters.seed, **sampling)
        assert tokens[-len(theirs) :].tolist() == theirs.tolist()


@dataclass
class Sequence:
    index: int
    left: int


def run_together(
    opened: OpenExecutor, arrivals: list[tuple[int, int]], slots: int, stride: int, cancel: dict[int, int] | None = None
) -> dict[int, Tokens]:
    """Drives an executor as a scheduler does.

    Args:
        opened: the executor.
        arrivals: (step, index of a request), in order.
        slots: number of slots to use.
        stride: the most steps per command.
        cancel: by index of a request, the step at which it is released unfinished.
    """
    waiting, running, done, now = list(arrivals), dict[int, Sequence](), dict[int, Tokens](), 0
    while waiting or running:
        for slot, sequence in list(running.items()):
            if sequence.left == 0 or (cancel or {}).get(sequence.index, now + 1) <= now:
                done[sequence.index] = opened.release(slot)
                del running[slot]
        # From the last slot down: another order than that of the sequences that ran alone.
        for slot in reversed(range(slots)):
            if slot not in running and waiting and waiting[0][0] <= now:
                index = waiting.pop(0)[1]
                command = opened.admit(slot, REQUESTS[index])
                opened.run(command)
                running[slot] = Sequence(index, command.tokens - 1)
        count = min([stride, *(sequence.left for sequence in running.values())])
        if running and count:
            opened.run(Step(count))
        for sequence in running.values():
            sequence.left -= count
        now += stride if not running else count
    return done


@pytest.mark.parametrize(
    ("arrivals", "slots", "stride"),
    [
        ([(0, 5)], 8, 7),
        ([(0, 0), (1, 1), (130, 2)], 8, 1),
        ([(9 * index, index) for index in range(8)], 8, 5),
        ([(0, index) for index in range(8)], 8, 64),
        ([(31 * (index // 3), index) for index in range(12)], 8, 4),
        ([(0, index) for index in range(4)], 2, 100),
    ],
    ids=["1", "3", "8 joining", "8 at once", "12 on 8 slots", "4 on 2 slots"],
)
def test_requests_together_give_the_tokens_they_give_alone(
    opened: OpenExecutor, alone: list[Tokens], arrivals: list[tuple[int, int]], slots: int, stride: int
) -> None:
    done = run_together(opened, arrivals, slots, stride)
    assert done.keys() == {index for _, index in arrivals}
    for index, tokens in done.items():
        assert tokens.tolist() == alone[index].tolist(), f"request {index}"


def test_all_slots_give_the_same_tokens(opened: OpenExecutor, alone: list[Tokens]) -> None:
    commands = [opened.admit(slot, REQUESTS[4]) for slot in range(8)]
    for command in commands:
        opened.run(command)
    opened.run(Step(commands[0].tokens - 1))
    for command in commands:
        assert opened.release(command.slot).tolist() == alone[4].tolist(), f"slot {command.slot}"


def test_cancelled_request_affects_neither_others_nor_its_slot(opened: OpenExecutor, alone: list[Tokens]) -> None:
    # Two slots: request 2 is admitted to the one that request 1 leaves unfinished.
    done = run_together(opened, [(0, 0), (0, 1), (50, 2)], slots=2, stride=10, cancel={1: 100})
    assert done[1].tolist() == alone[1][:101].tolist()
    assert [done[index].tolist() for index in (0, 2)] == [alone[index].tolist() for index in (0, 2)]


def test_discarded_slot_is_free(opened: OpenExecutor, alone: list[Tokens]) -> None:
    kept, dropped, next_one = opened.admit(0, REQUESTS[0]), opened.admit(1, REQUESTS[1]), opened.admit(1, REQUESTS[2])
    opened.run(kept)
    opened.run(dropped)
    opened.run(Step(30))
    opened.run(Discard(1))
    assert opened.release(1).tolist() == []
    opened.run(next_one)
    left = {0: kept.tokens - 31, 1: next_one.tokens - 1}
    steps, tokens = 0, dict[int, list[int]]()
    for slot in sorted(left, key=left.__getitem__):
        opened.run(Step(left[slot] - steps))
        steps, tokens[slot] = left[slot], opened.release(slot).tolist()
    assert tokens == {0: alone[0].tolist(), 1: alone[2].tolist()}


def test_closed_executor_refuses_steps_and_closes_again(make_checkpoint: MakeCheckpoint) -> None:
    executor = OpenExecutor(make_checkpoint(), slots=1).executor
    executor.close()
    executor.close()
    with pytest.raises(UnavailableError, match="closed"):
        executor.run(Step(1))


class MaskedDevice(CpuDevice):
    """A CPU with the attention of accelerators: over the whole cache, with a mask."""

    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return masked_decode_attention(query, keys, values, lengths)


def test_masked_attention_gives_the_same_tokens(make_checkpoint: MakeCheckpoint, alone: list[Tokens]) -> None:
    masked = OpenExecutor(make_checkpoint(), device=MaskedDevice(torch.device("cpu")))
    for index, tokens in run_together(masked, [(31 * (index // 3), index) for index in range(12)], 8, 4).items():
        assert tokens.tolist() == alone[index].tolist(), f"request {index}"


def test_idle_slot_releases_no_tokens(opened: OpenExecutor) -> None:
    assert opened.release(3).tolist() == []


@pytest.fixture(scope="module")
def engine(make_checkpoint: MakeCheckpoint) -> Iterator[ArEngine]:
    settings = ArSettings(max_sequence_tokens=640)
    made = ArEngine(Checkpoint.open(make_checkpoint()), open_device("cpu"), settings)
    yield made
    made.close()


def resolved(parameters: GenerationParameters, engine: ArEngine) -> ResolvedRequest:
    return parameters.resolve(Limits(), engine.sampling)


def expected(alone: list[Tokens], index: int) -> list[int]:
    parameters = REQUESTS[index]
    assert parameters.height is not None
    assert parameters.width is not None
    return alone[index][-(parameters.height // 32 * parameters.width // 32) :].tolist()


def at(tokens: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    """Returns a progress callback that acts once, in the engine's thread, when ``tokens`` tokens are sampled."""
    left = [act]

    def sink(progress: Progress) -> None:
        if progress.done >= tokens and left:
            left.pop()()

    return sink


def test_engine_serves_many_threads(engine: ArEngine, alone: list[Tokens]) -> None:
    ready = threading.Barrier(len(REQUESTS))
    results: dict[int, ArResult] = {}

    def submit(index: int) -> None:
        ready.wait(WAIT_SECONDS)
        future = engine.submit(RequestContext(), resolved(REQUESTS[index], engine))
        results[index] = future.result(WAIT_SECONDS)

    threads = [threading.Thread(target=submit, args=(index,)) for index in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert {index: result.prior_token_ids[0].tolist() for index, result in results.items()} == {
        index: expected(alone, index) for index in range(len(REQUESTS))
    }


def test_requests_join_while_others_run(engine: ArEngine, alone: list[Tokens]) -> None:
    futures: list[Future[ArResult]] = []
    for index in range(4):
        has_joined = threading.Event()
        futures.append(
            engine.submit(
                RequestContext(observers=(ProgressCallback(at(40, has_joined.set)),)), resolved(REQUESTS[index], engine)
            )
        )
        assert has_joined.wait(WAIT_SECONDS)
    for index, future in enumerate(futures):
        assert future.result(WAIT_SECONDS).prior_token_ids[0].tolist() == expected(alone, index)


def test_images_of_one_request_equal_single_images(engine: ArEngine, alone: list[Tokens]) -> None:
    others = [engine.submit(RequestContext(), resolved(REQUESTS[index], engine)) for index in range(4)]
    parameters = replace(REQUESTS[4], num_images=8)
    several = engine.submit(RequestContext(), resolved(parameters, engine)).result(WAIT_SECONDS).prior_token_ids
    assert several.shape == (8, 15)
    assert several[0].tolist() == expected(alone, 4)
    for index, future in enumerate(others):
        assert future.result(WAIT_SECONDS).prior_token_ids[0].tolist() == expected(alone, index)
    assert parameters.seed is not None
    single = engine.submit(RequestContext(), resolved(replace(REQUESTS[4], seed=parameters.seed + 7), engine)).result(
        WAIT_SECONDS
    )
    assert several[7].tolist() == single.prior_token_ids[0].tolist()


def test_engine_ends_cancelled_and_late_requests_and_no_others(engine: ArEngine, alone: list[Tokens]) -> None:
    unwanted, late = RequestContext(), RequestContext()
    unwanted.add_observer(ProgressCallback(at(40, unwanted.cancel)))
    late.add_observer(ProgressCallback(at(60, lambda: setattr(late, "deadline_ns", 1))))
    futures = [
        engine.submit(context, resolved(REQUESTS[index], engine))
        for index, context in enumerate([unwanted, RequestContext(), late])
    ]
    with pytest.raises(CancelledError):
        futures[0].result(WAIT_SECONDS)
    with pytest.raises(DeadlineExceededError):
        futures[2].result(WAIT_SECONDS)
    assert futures[1].result(WAIT_SECONDS).prior_token_ids[0].tolist() == expected(alone, 1)
    again = engine.submit(RequestContext(), resolved(REQUESTS[0], engine)).result(WAIT_SECONDS)
    assert again.prior_token_ids[0].tolist() == expected(alone, 0)


@pytest.mark.parametrize("fail_at", [Admit, Step, Release])
def test_after_a_fault_the_same_slots_give_the_same_tokens(
    opened: OpenExecutor, alone: list[Tokens], fail_at: type[ArCommand[Any]]
) -> None:
    faulty = FaultyExecutor(opened)
    scheduler = Scheduler(faulty.run, slots=2, max_queue=8)

    def submit(index: int) -> Request:
        parameters = REQUESTS[index]
        ids = opened.admit(0, parameters).prompt_ids
        request = Request(RequestContext(), ids, parameters.resolve(Limits(), opened.config.sampling))
        scheduler.submit(request)
        return request

    def run() -> None:
        while not scheduler.next_wait():
            scheduler.step()

    faulty.fail_at = fail_at
    failed = submit(1)
    run()
    with pytest.raises(RuntimeError, match=f"{fail_at.__name__} failed"):
        failed.future.result(0)
    requests = [submit(index) for index in range(3)]
    run()
    for index, request in enumerate(requests):
        assert request.tokens[0].tolist() == alone[index].tolist()
        assert request.future.result(0).prior_token_ids[0].tolist() == expected(alone, index)

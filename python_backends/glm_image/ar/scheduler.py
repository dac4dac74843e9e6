"""The host's side of the first stage: who waits, who runs, who is done. Touches no tensors.

One thread owns all of it. Sequences join and leave between steps; their lengths are known when they join, so nothing is
ever asked of the device to find out who is done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glm_image.ar.executor import Admit, Command, Encode, Release, Step
from glm_image.ar.measures import OCCUPANCY, PREFILL_SECONDS, RUNNING, STEP_SECONDS, TOKENS, WAITING
from glm_image.errors import GlmImageError, UnavailableError
from glm_image.geometry import PlacedGrid
from glm_image.job import Job
from glm_image.measures import Record, keep_nothing
from glm_image.request import ResolvedRequest

STEPS_A_LOOK = 4
"""Steps between two looks at who came, who left and who is done."""

Run = Callable[[Command], "NDArray[np.int32] | None"]


@dataclass
class Sources:
    """The source images of a request.

    Attributes:
        patches: fp32 [tokens, channels of a patch], what the vision tower reads.
        placed: where in the prompt they are.
        token_ids: int32 [tokens], what the vision tower made of them; None before the request's first turn.
    """

    patches: NDArray[np.float32]
    placed: tuple[PlacedGrid, ...]
    token_ids: NDArray[np.int32] | None = None

    def fill(self, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the prompt with the images' tokens at their places."""
        assert self.token_ids is not None
        filled, begin = list(prompt_ids), 0
        for start, grid in self.placed:
            filled[start : start + grid.tokens] = self.token_ids[begin : begin + grid.tokens].tolist()
            begin += grid.tokens
        return tuple(filled)


@dataclass
class _Request:
    job: Job
    prompt_ids: tuple[int, ...]
    resolved: ResolvedRequest
    submitted: float
    sources: Sources | None = None
    future: Future[NDArray[np.int32]] = field(default_factory=Future)
    waiting: deque[int] = field(default_factory=deque)
    tokens: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return sum(grid.tokens for grid in self.resolved.grids)

    @property
    def total(self) -> int:
        return self.length * len(self.resolved.seeds)


@dataclass
class _Running:
    request: _Request
    index: int
    left: int
    since: float


class Scheduler:
    """Continuous batching over the slots of an executor.

    Args:
        run: the executor, or what sends commands to all of its ranks.
        slots: sequences at once.
        max_queue: requests that may wait for a slot.
        record: takes what ``ar.measures`` names.
        first: commands to run before any request, in the thread that will run all of them.

    Raises:
        Exception: what a command of ``first`` raised.
    """

    def __init__(
        self, run: Run, slots: int, max_queue: int, record: Record = keep_nothing, first: Sequence[Command] = ()
    ) -> None:
        self._run = run
        self._record = record
        self._slots = slots
        self._max_queue = max_queue
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Running] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._load = (0, 0)
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._start, args=(first,), name="ar-scheduler", daemon=True)
        self._thread.start()
        self._ready.result()

    def submit(
        self, job: Job, prompt_ids: tuple[int, ...], resolved: ResolvedRequest, sources: Sources | None = None
    ) -> Future[NDArray[np.int32]]:
        """Queues a request; its future gives int32 [pictures, tokens of all grids], or the error it ended with.

        Args:
            job: looked at between steps.
            prompt_ids: the prompt.
            resolved: what is asked for.
            sources: source images; encoded once for all pictures, and their tokens noted.

        Raises:
            UnavailableError: the queue is full, or the engine is closed.
        """
        waiting = deque(range(len(resolved.seeds)))
        request = _Request(job, prompt_ids, resolved, time.monotonic(), sources, waiting=waiting)
        with self._changed:
            if self._closed:
                raise UnavailableError("glm_ar is stopping; no new requests are taken")
            if len(self._waiting) >= self._max_queue:
                raise UnavailableError(
                    f"glm_ar has {len(self._waiting)} requests waiting, as many as max_queue allows; try again later"
                )
            self._waiting.append(request)
            self._record_load()
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Ends all requests with UnavailableError and stops the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _start(self, first: Sequence[Command]) -> None:
        try:
            for command in first:
                self._run(command)
        except Exception as error:  # told to who makes the scheduler
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        self._loop()

    def _loop(self) -> None:
        reason: Exception = UnavailableError("glm_ar is stopping; send the request again")
        try:
            while self._wait_for_work():
                self._drop_unwanted()
                self._admit()
                if self._running:
                    self._step()
                self._record_load()
        except Exception as error:  # a fault of this loop; whoever waits must still be told
            reason = error
            raise
        finally:
            with self._changed:
                self._closed = True
            for request in self._requests():
                self._end(request, reason)
            self._record_load()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _requests(self) -> Iterator[_Request]:
        with self._changed:
            waiting = list(self._waiting)
        running = [running.request for running in self._running.values()]
        yield from {id(request): request for request in running + waiting}.values()

    def _drop_unwanted(self) -> None:
        for request in self._requests():
            try:
                request.job.check()
            except GlmImageError as error:
                self._end(request, error)

    def _admit(self) -> None:
        while len(self._running) < self._slots:
            with self._changed:
                if not self._waiting:
                    return
                request = self._waiting[0]
                index = request.waiting.popleft()
                if not request.waiting:
                    self._waiting.popleft()
            self._admit_one(request, index)

    def _admit_one(self, request: _Request, index: int) -> None:
        if index == 0:
            request.job.add_seconds("ar_queue", time.monotonic() - request.submitted)
        slot = next(slot for slot in range(self._slots) if slot not in self._running)
        resolved = request.resolved
        started = time.monotonic()
        self._running[slot] = _Running(request, index, request.length - 1, started)
        self._record_load()
        try:
            with request.job.timed("prefill"):
                self._encode(request)
                placed = request.sources.placed if request.sources else ()
                seed = resolved.seeds[index]
                self._run(Admit(slot, request.prompt_ids, resolved.grids, resolved.sampling, seed, placed))
        except Exception as error:  # this request alone ends with it
            self._end(request, error)
            return
        self._running[slot].since = time.monotonic()
        self._record(PREFILL_SECONDS, self._running[slot].since - started)
        self._record(TOKENS, 1)
        self._finish_done()

    def _encode(self, request: _Request) -> None:
        sources = request.sources
        if sources is not None and sources.token_ids is None:
            grids = tuple(placed.grid for placed in sources.placed)
            sources.token_ids = self._run(Encode(sources.patches, grids))
            request.prompt_ids = sources.fill(request.prompt_ids)

    def _step(self) -> None:
        count = min(STEPS_A_LOOK, *(running.left for running in self._running.values()))
        started = time.monotonic()
        try:
            self._run(Step(count))
        except Exception as error:  # the batch ends with it, the engine goes on
            for request in list(self._requests()):
                if any(running.request is request for running in self._running.values()):
                    self._end(request, error)
            return
        self._record(STEP_SECONDS, (time.monotonic() - started) / count, count)
        self._record(TOKENS, count * len(self._running))
        for running in self._running.values():
            running.left -= count
        self._finish_done()
        self._report()

    def _finish_done(self) -> None:
        for slot, running in [item for item in self._running.items() if item[1].left == 0]:
            if slot not in self._running:  # its request has just ended with another slot's error
                continue
            request = running.request
            try:
                tokens = self._run(Release(slot))
            except Exception as error:  # this request alone ends with it
                self._end(request, error)
                continue
            del self._running[slot]
            assert tokens is not None
            request.tokens[running.index] = tokens
            request.job.add_seconds("decode", time.monotonic() - running.since)
            if len(request.tokens) == len(request.resolved.seeds):
                request.future.set_result(np.stack([request.tokens[index] for index in sorted(request.tokens)]))

    def _record_load(self) -> None:
        with self._changed:  # recorded in the order in which it changes
            load = (len(self._running), sum(len(request.waiting) for request in self._waiting))
            if load == self._load:
                return
            self._load = load
            self._record(RUNNING, load[0])
            self._record(OCCUPANCY, load[0] / self._slots)
            self._record(WAITING, load[1])

    def _report(self) -> None:
        left: dict[int, int] = {}
        requests = {}
        for running in self._running.values():
            key = id(running.request)
            requests[key] = running.request
            left[key] = left.get(key, 0) + running.left
        for key, request in requests.items():
            total = request.total - left[key] - request.length * len(request.waiting)
            request.job.report("tokens", total, request.total)

    def _end(self, request: _Request, error: Exception) -> None:
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
        for slot in [slot for slot, running in self._running.items() if running.request is request]:
            del self._running[slot]
            try:
                self._run(Release(slot))
            except Exception:  # the error that ended the request is the one to tell
                continue
        if not request.future.done():
            request.future.set_exception(error)

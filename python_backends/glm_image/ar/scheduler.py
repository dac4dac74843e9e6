"""Continuous batching: which request waits, which runs, and which command the executor runs next.

Touches no tensors and starts no thread. Sequences join and leave between steps; their lengths are known when they
join, so the host knows which of them are done without waiting for the device; with speculation it learns a step late
how far they are. One thread calls ``step``; any thread may ``submit``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from numpy import int32
from numpy.typing import NDArray

from glm_image.ar.admission import Admission, ImmediateAdmission, QueueSnapshot
from glm_image.ar.commands import Admit, Advance, ArCommand, Discard, Encode, Peek, Release, Step
from glm_image.ar.metrics import ACCEPTED_TOKENS, PREFILL_SECONDS, QUEUE_SECONDS, STEP_SECONDS, TOKENS, LoadGauges
from glm_image.ar.request_queue import RequestQueue
from glm_image.ar.sequence import ArResult, Request, Running, report_progress
from glm_image.ar.speculation import WindowPolicy
from glm_image.errors import GlmImageError
from glm_image.lifecycle.context import NANOSECONDS
from glm_image.lifecycle.durations import DurationStats
from glm_image.parallel.commands import R
from glm_image.request.stages import Stage
from glm_image.telemetry.metrics import MetricSink, null_sink


class Run(Protocol):
    """Runs a command on the executor, on all ranks of it, and returns its result."""

    def __call__(self, command: ArCommand[R], /) -> R: ...


class Scheduler:
    """Decides which sequence gets a slot and when, and runs the commands that follow."""

    def __init__(
        self,
        run: Run,
        slots: int,
        max_queue: int,
        record: MetricSink = null_sink,
        admission: Admission | None = None,
        windows: WindowPolicy | None = None,
    ) -> None:
        self.admission = admission or ImmediateAdmission()
        self._run = run
        self._windows = windows
        self._record = record
        self._slots = slots
        self._free_slots = list(reversed(range(slots)))
        self._queue = RequestQueue(max_queue)
        self._running: dict[int, Running] = {}
        self._step_durations = DurationStats()
        self._load = LoadGauges(record, slots, self._count_load)

    def submit(self, request: Request) -> Future[ArResult]:
        """Queues a request; see ``ArEngine.submit``."""
        self._queue.add(request, self._needed_seconds(request), self._expected_wait)
        self._load.update()
        request.context.on_cancel(partial(self._cancel_unbegun, request))
        return request.future

    @property
    def is_stopping(self) -> bool:
        return self._queue.is_closed

    def stop(self) -> None:
        self._queue.close()

    def end_all(self, error: Exception) -> None:
        """Refuses requests from now on, and ends all that run or wait with an error."""
        self._queue.close()
        for request in self._requests():
            self._end(request, error)
        self._load.update()

    def next_wait(self) -> float:
        """Returns the seconds until ``step`` has something to do, unless something changes; inf without a request."""
        if self._running:
            return 0.0
        waiting = self._queue.requests()
        return self._admission_wait(waiting) if waiting else math.inf

    def step(self) -> None:
        """Ends cancelled and late requests, fills free slots, and takes one decode step."""
        self._admit()
        if self._running:
            self._decode()
        self._load.update()

    def _admission_wait(self, waiting: tuple[Request, ...]) -> float:
        """Returns the seconds that the first request in the queue has to wait, unless something changes."""
        first, now, running = waiting[0], time.monotonic(), len(self._running)
        decode_seconds = first.length * self._step_durations.mean
        if first.admit_by == math.inf:
            first.admit_by = now + self.admission.max_wait(running, decode_seconds)
        deadlines = [request.context.deadline_ns / NANOSECONDS for request in waiting if request.context.deadline_ns]
        steps_left = max((sequence.left for sequence in self._running.values()), default=0)
        return self.admission.wait(
            QueueSnapshot(
                now=now,
                waiting=sum(len(request.waiting) for request in waiting),
                free=self._slots - running,
                running=running,
                extends=max(0.0, 1 - steps_left / first.length),
                has_begun=first.has_begun,
                latest=first.admit_by,
                deadline=min(deadlines, default=math.inf),
                decode_seconds=decode_seconds,
            )
        )

    def _admit(self) -> None:
        self._end_unwanted()
        while self._free_slots and (waiting := self._queue.requests()) and not self._admission_wait(waiting):
            index = self._queue.take(waiting[0])
            if index is not None:  # else it was cancelled meanwhile
                self._admit_image(waiting[0], index)
                self._end_unwanted()  # a prefill takes as long as several steps

    def _admit_image(self, request: Request, index: int) -> None:
        now = time.monotonic()
        if index == 0:
            request.context.add_seconds(Stage.AR_QUEUE, now - request.submitted)
            self._record(QUEUE_SECONDS, now - request.submitted)
        slot = self._free_slots.pop()
        sequence = self._running[slot] = Running(request, index, request.length - 1, now)
        self._load.update()
        with self._ending_on_error(request):
            self._prefill(slot, sequence)
        self._finish_done()

    def _prefill(self, slot: int, sequence: Running) -> None:
        request, resolved, started = sequence.request, sequence.request.resolved, sequence.since
        with request.context.timed(Stage.PREFILL):
            self._encode_sources(request)
            placed = request.sources.placed if request.sources else ()
            seed = resolved.seeds[sequence.index]
            self._run(Admit(slot, request.prompt_ids, resolved.grids, resolved.sampling, seed, placed))
        if self._windows is not None:
            self._windows.begin(slot)
        sequence.since = time.monotonic()
        self._record(PREFILL_SECONDS, sequence.since - started)
        self._record(TOKENS, 1)
        request.context.report(Stage.PREFILL, sequence.index + 1, request.images)
        request.sampled.done += 1
        request.context.progress = request.sampled.progress

    def _encode_sources(self, request: Request) -> None:
        sources = request.sources
        if sources is None or request.source_token_ids.size:
            return
        request.source_token_ids = self._run(Encode(sources.patches, sources.grids))
        request.prompt_ids = sources.insert(request.prompt_ids, request.source_token_ids)

    def _decode(self) -> None:
        started = time.monotonic()
        with self._ending_on_error(*dict.fromkeys(sequence.request for sequence in self._running.values())):
            advanced = self._take_step()
            self._record(STEP_SECONDS, time.monotonic() - started)
            self._record(TOKENS, sum(advanced.values()))
            for slot, tokens in advanced.items():
                sequence = self._running[slot]
                sequence.steps += 1
                sequence.left -= tokens
                sequence.request.sampled.done += tokens
        self._publish_previews()
        self._finish_done()
        report_progress(self._running.values())

    def _take_step(self) -> dict[int, int]:
        """Returns by how many tokens sequences are known to have advanced since the last step, by slot."""
        if self._windows is None:
            self._run(Step(1))
            return dict.fromkeys(self._running, 1)
        widths = self._windows.widths({slot: sequence.left for slot, sequence in self._running.items()})
        advanced = self._run(Advance(tuple(widths.items())))
        for step in advanced:
            self._windows.observe(step)
            self._record(ACCEPTED_TOKENS, step.accepted)
        return {step.slot: step.accepted for step in advanced}

    def _publish_previews(self) -> None:
        for slot, sequence in list(self._running.items()):
            request = sequence.request
            if sequence.index or not request.context.wants_preview:
                continue
            preview = request.resolved.grids[0].tokens
            if request.length - sequence.left >= preview:
                with self._ending_on_error(request):
                    request.context.publish_preview(self._run(Peek(slot, preview)))

    def _finish_done(self) -> None:
        for slot, sequence in list(self._running.items()):
            if sequence.left == 0 and slot in self._running:  # an error of another slot may have ended its request
                with self._ending_on_error(sequence.request):
                    self._finish(slot, sequence, self._run(Release(slot)))

    def _finish(self, slot: int, sequence: Running, tokens: NDArray[int32]) -> None:
        request = sequence.request
        self._free(slot)
        request.tokens[sequence.index], request.steps[sequence.index] = tokens, sequence.steps
        seconds = time.monotonic() - sequence.since
        request.context.add_seconds(Stage.DECODE, seconds)
        # The host runs ahead of the device, so only all of a sequence's steps together can be timed from here.
        self._step_durations.add(seconds / max(1, request.length - 1))
        if request.is_complete:
            request.future.set_result(request.result())

    def _free(self, slot: int) -> None:
        del self._running[slot]
        self._free_slots.append(slot)

    @contextmanager
    def _ending_on_error(self, *requests: Request) -> Iterator[None]:
        """Ends these requests, and no others, with an error of the block."""
        try:
            yield
        except Exception as error:
            for request in requests:
                self._end(request, error)

    def _end_unwanted(self) -> None:
        for request in self._requests():
            try:
                request.context.check(self._needed_seconds(request))
            except GlmImageError as error:
                self._end(request, error)

    def _end(self, request: Request, error: Exception) -> None:
        self._queue.remove(request)
        for slot in [slot for slot, sequence in self._running.items() if sequence.request is request]:
            self._free(slot)
            with contextlib.suppress(Exception):  # the error that ended the request is the one to report
                self._run(Discard(slot))
        _fail(request, error)

    def _cancel_unbegun(self, request: Request) -> None:
        """Ends a cancelled request that has no slot, in the thread that cancels it."""
        if not self._queue.remove_unbegun(request):
            return
        self._load.update()
        try:
            request.context.check()
        except GlmImageError as error:
            _fail(request, error)

    def _requests(self) -> list[Request]:
        running = [sequence.request for sequence in self._running.values()]
        return list(dict.fromkeys([*running, *self._queue.requests()]))

    def _count_load(self) -> tuple[int, int]:
        return len(self._running), sum(len(request.waiting) for request in self._queue.requests())

    def _needed_seconds(self, request: Request) -> float:
        """Returns the least time that the rest of a request's decoding takes."""
        left = [sequence.left for sequence in list(self._running.values()) if sequence.request is request]
        rounds = math.ceil(len(request.waiting) / self._slots)
        return (max(left, default=0) + rounds * (request.length - 1)) * self._step_durations.fastest

    def _expected_wait(self, waiting: tuple[Request, ...]) -> float:
        running = sum(sequence.left for sequence in list(self._running.values()))
        queued = sum(len(request.waiting) * request.length for request in waiting)
        return (running + queued) / self._slots * self._step_durations.mean


def _fail(request: Request, error: Exception) -> None:
    if isinstance(error, GlmImageError):
        error.__traceback__ = None  # its frames hold the request, which holds the error
    with contextlib.suppress(InvalidStateError):  # it has ended already
        request.future.set_exception(error)

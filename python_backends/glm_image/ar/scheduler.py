"""The host's side of the first stage: who waits, who runs, who is done. Touches no tensors.

One thread owns all of it. Sequences join and leave between steps; their lengths are known when they join, so nothing is
ever asked of the device to find out who is done.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError

import numpy as np
from numpy.typing import NDArray

from glm_image.ar.admission import Admission, ImmediateAdmission, QueueSnapshot
from glm_image.ar.commands import Admit, Command, Encode, Peek, Release, Step
from glm_image.ar.metrics import OCCUPANCY, PREFILL_SECONDS, QUEUE_SECONDS, RUNNING, STEP_SECONDS, TOKENS, WAITING
from glm_image.ar.sequence import Request, Running, Sources, report_progress
from glm_image.errors import GlmImageError, QueueFullError, UnavailableError
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.lifecycle.eta import DurationStats
from glm_image.request.parameters import ResolvedRequest
from glm_image.request.stages import Stage
from glm_image.telemetry.metrics import MetricSink, null_sink

Run = Callable[[Command], "NDArray[np.int32] | None"]


class Scheduler:
    """Continuous batching over the slots of an executor.

    Args:
        run: the executor, or what sends commands to all of its ranks.
        slots: sequences at once.
        max_queue: requests that may wait for a slot.
        record: takes what ``ar.measures`` names.
        first: commands to run before any request, in the thread that will run all of them.
        admission: says when a free slot is filled.

    Raises:
        Exception: what a command of ``first`` raised.
    """

    def __init__(
        self,
        run: Run,
        slots: int,
        max_queue: int,
        record: MetricSink = null_sink,
        first: Sequence[Command] = (),
        admission: Admission | None = None,
    ) -> None:
        self._run = run
        self._record = record
        self._slots = slots
        self._max_queue = max_queue
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Running] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._load = (0, 0)
        self._pace = DurationStats()
        self._admission = admission or ImmediateAdmission()
        self._admission.when_changed(self._look_again)
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._start, args=(first,), name="ar-scheduler", daemon=True)
        self._thread.start()
        self._ready.result()

    def submit(
        self,
        context: RequestContext,
        prompt_ids: tuple[int, ...],
        resolved: ResolvedRequest,
        sources: Sources | None = None,
    ) -> Future[NDArray[np.int32]]:
        """Queues a request; its future gives int32 [pictures, tokens of all grids], or the error it ended with.

        Args:
            context: looked at between steps.
            prompt_ids: the prompt.
            resolved: what is asked for.
            sources: source images; encoded once for all pictures, and their tokens noted.

        Raises:
            QueueFullError: as many requests wait as may.
            UnavailableError: the engine is closed.
            DeadlineExceededError: it cannot be done in its time.
        """
        waiting = deque(range(len(resolved.seeds)))
        request = Request(context, prompt_ids, resolved, time.monotonic(), sources, waiting=waiting)
        with self._changed:
            if self._closed:
                raise UnavailableError("glm_ar is stopping; no new requests are taken")
            if len(self._waiting) >= self._max_queue:
                raise QueueFullError(
                    f"glm_ar has {len(self._waiting)} requests waiting, as many as max_queue allows; "
                    f"one more would wait about {self._expected_wait():.0f} s; try again later"
                )
            context.check(self._needed_seconds(request))
            self._waiting.append(request)
            self._record_load()
            self._changed.notify()
        context.on_cancel(lambda: self._drop_waiting(request))
        return request.future

    def is_alive(self) -> bool:
        """Whether requests are still worked on; does not return when a lock is never released."""
        with self._changed:
            return self._thread.is_alive()

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

    def _look_again(self) -> None:
        with self._changed:
            self._changed.notify()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._running) and (seconds := self._admission_wait()):
                self._changed.wait(None if seconds == math.inf else seconds)
            return not self._closed

    def _admission_wait(self) -> float:
        """How long the first in line is to wait still, unless something changes; inf where nobody waits."""
        if not self._waiting:
            return math.inf
        first, now, running = self._waiting[0], time.monotonic(), len(self._running)
        decode_seconds = first.length * self._pace.mean
        if first.latest == math.inf:
            first.latest = now + self._admission.max_wait(running, decode_seconds)
        longest = max((one.left for one in self._running.values()), default=0)
        deadlines = [
            request.context.deadline_ns / NANOSECONDS for request in self._waiting if request.context.deadline_ns
        ]
        return self._admission.wait(
            QueueSnapshot(
                now=now,
                waiting=sum(len(request.waiting) for request in self._waiting),
                free=self._slots - running,
                running=running,
                extends=max(0.0, 1 - longest / first.length),
                has_begun=first.has_begun,
                latest=first.latest,
                deadline=min(deadlines, default=math.inf),
                decode_seconds=decode_seconds,
            )
        )

    def _requests(self) -> Iterator[Request]:
        with self._changed:
            waiting = list(self._waiting)
        running = [running.request for running in self._running.values()]
        yield from {id(request): request for request in running + waiting}.values()

    def _drop_unwanted(self) -> None:
        for request in self._requests():
            try:
                request.context.check(self._needed_seconds(request))
            except GlmImageError as error:
                self._end(request, error)

    def _drop_waiting(self, request: Request) -> None:
        """Ends a cancelled request of which nothing runs, in the thread of whoever cancels it."""
        with self._changed:
            if request not in self._waiting or request.has_begun:
                return
            self._waiting.remove(request)
            self._record_load()
        try:
            request.context.check()
        except GlmImageError as error:
            self._fail(request, error)

    def _needed_seconds(self, request: Request) -> float:
        """The least that a request's decoding still takes."""
        running = [running.left for running in list(self._running.values()) if running.request is request]
        rounds = math.ceil(len(request.waiting) / self._slots)
        return (max(running, default=0) + rounds * (request.length - 1)) * self._pace.fastest

    def _expected_wait(self) -> float:
        running = sum(running.left for running in list(self._running.values()))
        waiting = sum(len(request.waiting) * request.length for request in self._waiting)
        return (running + waiting) / self._slots * self._pace.mean

    def _admit(self) -> None:
        self._drop_unwanted()
        while len(self._running) < self._slots:
            with self._changed:
                if self._admission_wait():
                    return
                request = self._waiting[0]
                index = request.waiting.popleft()
                if not request.waiting:
                    self._waiting.popleft()
            self._admit_one(request, index)
            self._drop_unwanted()  # reading a prompt takes as long as some steps

    def _admit_one(self, request: Request, index: int) -> None:
        if index == 0:
            waited = time.monotonic() - request.submitted
            request.context.add_seconds(Stage.AR_QUEUE, waited)
            self._record(QUEUE_SECONDS, waited)
        slot = next(slot for slot in range(self._slots) if slot not in self._running)
        resolved = request.resolved
        started = time.monotonic()
        self._running[slot] = Running(request, index, request.length - 1, started)
        self._record_load()
        try:
            with request.context.timed(Stage.PREFILL):
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
        request.context.report(Stage.PREFILL, index + 1, len(resolved.seeds))
        request.drawn.done += 1
        request.context.progress = request.drawn.progress
        self._finish_done()

    def _encode(self, request: Request) -> None:
        sources = request.sources
        if sources is not None and sources.token_ids is None:
            grids = tuple(placed.grid for placed in sources.placed)
            sources.token_ids = self._run(Encode(sources.patches, grids))
            request.prompt_ids = sources.fill(request.prompt_ids)

    def _step(self) -> None:
        started = time.monotonic()
        try:
            self._run(Step(1))
        except Exception as error:  # the batch ends with it, the engine goes on
            for request in list(self._requests()):
                if any(running.request is request for running in self._running.values()):
                    self._end(request, error)
            return
        self._record(STEP_SECONDS, time.monotonic() - started)
        self._record(TOKENS, len(self._running))
        for running in self._running.values():
            running.left -= 1
            running.request.drawn.done += 1
        self._hand_out_previews()
        self._finish_done()
        report_progress(self._running.values())

    def _hand_out_previews(self) -> None:
        for slot, running in list(self._running.items()):
            request, preview = running.request, running.request.resolved.grids[0].tokens
            if not request.context.wants_preview or running.index or request.length - running.left < preview:
                continue
            try:
                tokens = self._run(Peek(slot, preview))
            except Exception as error:  # this request alone ends with it
                self._end(request, error)
                continue
            assert tokens is not None
            request.context.publish_preview(tokens)

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
            seconds = time.monotonic() - running.since
            request.context.add_seconds(Stage.DECODE, seconds)
            # The host runs ahead of the device, so only all of a sequence's steps together can be timed from here.
            self._pace.add(seconds / max(1, request.length - 1))
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

    def _end(self, request: Request, error: Exception) -> None:
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
        for slot in [slot for slot, running in self._running.items() if running.request is request]:
            del self._running[slot]
            try:
                self._run(Release(slot, wanted=False))
            except Exception:  # the error that ended the request is the one to tell
                continue
        self._fail(request, error)

    @staticmethod
    def _fail(request: Request, error: Exception) -> None:
        if isinstance(error, GlmImageError):
            error.__traceback__ = None  # its frames hold the request, which holds the error
        with contextlib.suppress(InvalidStateError):  # it has ended
            request.future.set_exception(error)

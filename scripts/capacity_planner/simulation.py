"""Requests on their way through both stages, simulated: who waits for what, event by event.

The stages are those of this project: a first one that decodes up to so many sequences together, which join and leave
between steps when its admission lets them, and second ones that each paint a picture at a time, the next going to
whichever is free. Who is admitted is decided by the code that a server decides it with.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from glm_image.ar.admission import Admission, BatchAdmission, ImmediateAdmission, QueueSnapshot
from glm_image.lifecycle.downstream import DitLoad
from glm_image.lifecycle.eta import DurationStats

Process = Generator[simpy.Event, Any, None]

UNFINISHED_REQUESTS = 2
"""Pictures that may wait for the VAE while a next one is denoised, as in ``serving.dit_backend``."""

NOTHING_LEFT = 1e-9
"""Seconds of work that are the rounding of a float."""


@dataclass(frozen=True)
class Work:
    """What a picture asks of the stages, all in seconds of a device that nobody else uses.

    Attributes:
        tokens: image tokens that the first stage draws, those of the preview included.
        prefill: reading the prompt, which holds up what is decoding.
        step: a decode step of so many running sequences.
        paint: conditions and denoising; drawn anew for each picture.
        finish: the VAE's; others are painted meanwhile, on the same device.
        encode: on the host, beside all that.
        overhead: of the network and of Triton, in all.
    """

    tokens: int
    prefill: float
    step: Callable[[int], float]
    paint: Callable[[random.Random], float]
    finish: float = 0.0
    encode: float = 0.0
    overhead: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Which device each instance runs on; instances that name the same one share it.

    Attributes:
        ar: the device of each first stage.
        dit: the device of each second stage.
        slots: sequences that a first stage decodes together.
        cores: pieces of work that a device does at full speed at once; more than those share it evenly.
        admission: the first stages', of ``ar.admission.ADMISSIONS``.
    """

    ar: tuple[str, ...]
    dit: tuple[str, ...]
    slots: int = 8
    cores: float = 1.0
    admission: str = "at_once"


@dataclass(frozen=True)
class Outcome:
    """What became of the requests, in the order in which they came; seconds.

    Attributes:
        arrived: when each came.
        decoded: when each had its tokens.
        painting: when each began to be painted.
        answered: when each was done.
    """

    arrived: list[float]
    decoded: list[float]
    painting: list[float]
    answered: list[float]

    @property
    def latencies(self) -> list[float]:
        """Seconds from the arrival of each to its answer."""
        return [end - begin for begin, end in zip(self.arrived, self.answered, strict=True)]

    @property
    def throughput(self) -> float:
        """Pictures a second, from the first arrival to the last answer."""
        return len(self.answered) / (max(self.answered) - min(self.arrived))


class _Job:
    """A piece of work under way."""

    def __init__(self, left: float, done: simpy.Event) -> None:
        self.left, self.done = left, done


class Device:
    """Does ``cores`` jobs at full speed; more of them share it evenly (processor sharing)."""

    def __init__(self, clock: simpy.Environment, cores: float) -> None:
        self._clock, self._cores = clock, cores
        self._jobs: list[_Job] = []
        self._since = clock.now
        self._plan = 0

    def work(self, seconds: float) -> _Job:
        """Begins a job; its ``done`` happens when it has had ``seconds`` of the device."""
        self._advance()
        job = _Job(seconds, self._clock.event())
        self._jobs.append(job)
        self._reckon()
        return job

    def left(self, job: _Job) -> float:
        """Returns the seconds that a job still wants."""
        self._advance()
        return job.left

    def shorten(self, job: _Job, seconds: float) -> None:
        """Lets a job want only ``seconds`` more."""
        self._advance()
        job.left = seconds
        self._reckon()

    @property
    def _speed(self) -> float:
        return min(1.0, self._cores / len(self._jobs)) if self._jobs else 1.0

    def _advance(self) -> None:
        worked = (self._clock.now - self._since) * self._speed
        self._since = self._clock.now
        for job in self._jobs:
            job.left -= worked

    def _reckon(self) -> None:
        """Ends what is done, and comes back when the next job will be."""
        for job in [job for job in self._jobs if job.left <= NOTHING_LEFT]:
            self._jobs.remove(job)
            job.done.succeed()
        self._plan += 1
        if self._jobs:
            plan, soonest = self._plan, min(job.left for job in self._jobs)
            self._clock.timeout(soonest / self._speed).callbacks.append(lambda _: self._due(plan))

    def _due(self, plan: int) -> None:
        if plan == self._plan:
            self._advance()
            self._reckon()


def _say_nothing(*_: object) -> None:
    """That a simulated request's patience ran out is no news."""


@dataclass(eq=False)
class _Sequence:
    """A request in the first stage; ``left`` are the steps that it has still to take."""

    index: int
    done: simpy.Event
    latest: float = math.inf
    left: int = 0
    since: float = 0.0


class _FirstStage:
    """Continuous batching: sequences are admitted one after the other, then all take steps together."""

    def __init__(self, clock: simpy.Environment, device: Device, layout: Layout, work: Work) -> None:
        self._clock, self._device, self._slots, self._work = clock, device, layout.slots, work
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._pace = DurationStats()
        self._changed = clock.event()
        self.backlog = DitLoad(lambda: float(clock.now))
        self._admission: Admission = (
            BatchAdmission(self.backlog, _say_nothing) if layout.admission == "gathered" else ImmediateAdmission()
        )
        self._admission.when_changed(self._look_again)
        clock.process(self._run())

    def decode(self, index: int) -> simpy.Event:
        """Queues a request's sequence; the event is its end."""
        self._waiting.append(_Sequence(index, self._clock.event()))
        self._look_again()
        return self._waiting[-1].done

    def _look_again(self) -> None:
        if not self._changed.triggered:
            self._changed.succeed()

    def _run(self) -> Process:
        while True:
            while not self._running and (seconds := self._admission_wait()):
                yield self._change(seconds)
            while len(self._running) < self._slots and not self._admission_wait():
                admitted = self._waiting.popleft()
                yield self._device.work(self._work.prefill).done
                admitted.left, admitted.since = self._work.tokens - 1, self._clock.now  # the prompt gives the first
                self._running.append(admitted)
            yield from self._take_steps()
            for done in [one for one in self._running if one.left == 0]:
                self._running.remove(done)
                self._pace.add((self._clock.now - done.since) / max(1, self._work.tokens - 1))
                self.backlog.forwarded(done.index, 1)
                done.done.succeed()

    def _admission_wait(self) -> float:
        """As ``ar.scheduler`` asks: seconds that the first in line is to wait still; inf where nobody waits."""
        if not self._waiting:
            return math.inf
        first, now, running, length = self._waiting[0], self._clock.now, len(self._running), self._work.tokens
        decode_seconds = length * self._pace.mean
        if first.latest == math.inf:
            first.latest = now + self._admission.max_wait(running, decode_seconds)
        return self._admission.wait(
            QueueSnapshot(
                now=now,
                waiting=len(self._waiting),
                free=self._slots - running,
                running=running,
                extends=1 - max((one.left for one in self._running), default=0) / length,
                has_begun=False,
                latest=first.latest,
                deadline=math.inf,
                decode_seconds=decode_seconds,
            )
        )

    def _change(self, seconds: float) -> simpy.Event:
        """What happens when somebody comes, a painter says something, or the time is over."""
        self._changed = self._clock.event()
        if seconds == math.inf:
            return self._changed
        return self._changed | self._clock.timeout(max(seconds, NOTHING_LEFT))

    def _take_steps(self) -> Process:
        """Takes steps until the first sequence ends, or until someone is let into a free slot."""
        count = min(one.left for one in self._running)
        step = self._work.step(len(self._running))
        job = self._device.work(count * step)
        while len(self._running) < self._slots and not job.done.triggered:
            yield job.done | self._change(self._admission_wait())
            if not job.done.triggered and not self._admission_wait():
                taken = count - self._device.left(job) / step
                count = min(count, math.ceil(taken - NOTHING_LEFT))  # the step under way is the last before
                self._device.shorten(job, (count - taken) * step)
                break
        yield job.done
        for one in self._running:
            one.left -= count


@dataclass(eq=False)
class _Painter:
    """An instance of the second stage, which states what it has left to paint whenever that changes."""

    name: str
    device: Device
    unfinished: simpy.Resource
    finisher: simpy.Resource
    listeners: Sequence[DitLoad]
    left: dict[int, int] = field(default_factory=dict)
    pace: DurationStats = field(default_factory=DurationStats)

    def tell(self) -> None:
        """As ``backlog.DitLoadReporter`` does."""
        for backlog in self.listeners:
            requests = list(self.left.items())
            backlog.update({"instance": self.name, "requests": requests, "seconds_per_image": self.pace.mean})


class _Server:
    """Both stages, and the way of a request through them."""

    def __init__(self, layout: Layout, work: Work, requests: int, seed: int) -> None:
        self.clock = simpy.Environment()
        devices = {name: Device(self.clock, layout.cores) for name in (*layout.ar, *layout.dit)}
        self._first = [_FirstStage(self.clock, devices[name], layout, work) for name in layout.ar]
        backlogs = [first.backlog for first in self._first]
        self._free = simpy.Store(self.clock)
        for number, name in enumerate(layout.dit):
            unfinished, finisher = simpy.Resource(self.clock, UNFINISHED_REQUESTS), simpy.Resource(self.clock, 1)
            self._free.items.append(_Painter(str(number), devices[name], unfinished, finisher, backlogs))
        self._work = work
        self._random = random.Random(
            f"work {seed}"
        )  # not the numbers that the arrivals of the same seed were drawn from
        self.outcome = Outcome(*([math.nan] * requests for _ in range(4)))

    def come(self, arrivals: Sequence[float]) -> Process:
        """Sends the requests in."""
        for index, arrival in enumerate(arrivals):
            yield self.clock.timeout(arrival - self.clock.now)
            self.clock.process(self._go_through(index))

    def keep_coming(self, waiting: Iterator[int]) -> Process:
        """Sends a request in whenever the one before is answered."""
        for index in waiting:
            yield self.clock.process(self._go_through(index))

    def _go_through(self, index: int) -> Process:
        work, clock, outcome = self._work, self.clock, self.outcome
        outcome.arrived[index] = clock.now
        yield clock.timeout(work.overhead)
        yield self._first[index % len(self._first)].decode(index)
        outcome.decoded[index] = clock.now
        painter: _Painter = yield self._free.get()
        outcome.painting[index] = clock.now
        painter.left[index] = 1
        painter.tell()
        yield painter.device.work(work.paint(self._random)).done
        painter.pace.add(clock.now - outcome.painting[index])
        painter.left[index] = 0
        painter.tell()
        with painter.unfinished.request() as may_wait:
            yield may_wait
            self._free.put(painter)
            with painter.finisher.request() as turn:
                yield turn
                yield painter.device.work(work.finish).done
                yield clock.timeout(work.encode)
        del painter.left[index]
        painter.tell()
        outcome.answered[index] = clock.now


def simulate(layout: Layout, work: Work, arrivals: Sequence[float], seed: int = 0) -> Outcome:
    """Serves requests that come at given seconds.

    Args:
        layout: the instances and their devices.
        work: what each picture asks of them.
        arrivals: ascending, at least one.
        seed: of what ``work`` draws.
    """
    server = _Server(layout, work, len(arrivals), seed)
    server.clock.process(server.come(arrivals))
    server.clock.run()
    return server.outcome


def saturate(layout: Layout, work: Work, requests: int, seed: int = 0) -> Outcome:
    """Serves as many requests at once as there are slots, and two a painter: the most that the layout keeps up."""
    server = _Server(layout, work, requests, seed)
    waiting = iter(range(requests))
    for _ in range(layout.slots * len(layout.ar) + 2 * len(layout.dit)):
        server.clock.process(server.keep_coming(waiting))
    server.clock.run()
    return server.outcome


def poisson_arrivals(rate: float, requests: int, seed: int = 0) -> list[float]:
    """Returns when requests come that know nothing of each other: ``rate`` a second on average."""
    source, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += source.expovariate(rate)
        arrivals.append(now)
    return arrivals


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest value that at least ``percent`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

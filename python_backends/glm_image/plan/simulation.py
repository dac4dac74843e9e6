"""Requests on their way through both stages, simulated: who waits for what, event by event.

The stages are those of this project: a first one that decodes up to so many sequences together, which join and leave
between steps, and second ones that each paint a picture at a time, the next going to whichever is free.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

Process = Generator[simpy.Event, Any, None]

STEPS_A_LOOK = 4
"""Decode steps between two looks at who came, as in ``ar.scheduler``."""

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
    """

    ar: tuple[str, ...]
    dit: tuple[str, ...]
    slots: int = 8
    cores: float = 1.0


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


class _FirstStage:
    """Continuous batching: sequences are admitted one after the other, then all take steps together."""

    def __init__(self, clock: simpy.Environment, device: Device, slots: int, work: Work) -> None:
        self._clock, self._device, self._slots, self._work = clock, device, slots, work
        self._waiting: deque[simpy.Event] = deque()
        self._running: dict[simpy.Event, int] = {}
        self._came = clock.event()
        clock.process(self._run())

    def decode(self) -> simpy.Event:
        """Queues a sequence; the event is its end."""
        done = self._clock.event()
        self._waiting.append(done)
        if not self._came.triggered:
            self._came.succeed()
        return done

    def _run(self) -> Process:
        while True:
            if not self._waiting and not self._running:
                self._came = self._clock.event()
                yield self._came
            while self._waiting and len(self._running) < self._slots:
                admitted = self._waiting.popleft()
                yield self._device.work(self._work.prefill).done
                self._running[admitted] = self._work.tokens - 1  # the prompt gives the first
            yield from self._take_steps()
            for done in [done for done, left in self._running.items() if left == 0]:
                del self._running[done]
                done.succeed()

    def _take_steps(self) -> Process:
        """Takes steps until the first sequence ends, or until someone comes for whom there is a slot."""
        count = min(self._running.values())
        step = self._work.step(len(self._running))
        job = self._device.work(count * step)
        if len(self._running) < self._slots:
            self._came = self._clock.event()
            yield job.done | self._came
            if not job.done.triggered:
                taken = count - self._device.left(job) / step
                count = min(count, STEPS_A_LOOK * math.ceil(taken / STEPS_A_LOOK - NOTHING_LEFT))
                self._device.shorten(job, (count - taken) * step)
        yield job.done
        for done in self._running:
            self._running[done] -= count


class _Painter:
    """An instance of the second stage."""

    def __init__(self, clock: simpy.Environment, device: Device) -> None:
        self.device = device
        self.unfinished = simpy.Resource(clock, UNFINISHED_REQUESTS)
        self.finisher = simpy.Resource(clock, 1)


class _Server:
    """Both stages, and the way of a request through them."""

    def __init__(self, layout: Layout, work: Work, requests: int, seed: int) -> None:
        self.clock = simpy.Environment()
        devices = {name: Device(self.clock, layout.cores) for name in (*layout.ar, *layout.dit)}
        self._first = [_FirstStage(self.clock, devices[name], layout.slots, work) for name in layout.ar]
        self._free = simpy.Store(self.clock)
        self._free.items.extend(_Painter(self.clock, devices[name]) for name in layout.dit)
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
        yield self._first[index % len(self._first)].decode()
        outcome.decoded[index] = clock.now
        painter = yield self._free.get()
        outcome.painting[index] = clock.now
        yield painter.device.work(work.paint(self._random)).done
        with painter.unfinished.request() as may_wait:
            yield may_wait
            self._free.put(painter)
            with painter.finisher.request() as turn:
                yield turn
                yield painter.device.work(work.finish).done
                yield clock.timeout(work.encode)
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

"""Discrete-event simulation of requests in both stages.

The AR stage decodes several sequences together; sequences join and leave between steps, when its admission policy
admits them. Each DiT instance denoises one image at a time and takes the next one of a common queue when it is free.
Admission is decided by the server's own code.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import simpy

from glm_image.ar.admission import Admission, BatchAdmission, ImmediateAdmission, QueueSnapshot
from glm_image.lifecycle.dit_load import DitLoad
from glm_image.lifecycle.durations import DurationStats

Process = Generator[simpy.Event, Any, None]

UNFINISHED_REQUESTS = 2
"""Images that may wait for the VAE while another is denoised, as in ``serving.dit_backend``."""

ROUNDING_SECONDS = 1e-9
"""Remaining work that is only the rounding of a float."""


@dataclass(frozen=True)
class StageCosts:
    """Cost of an image in each phase, in seconds of an idle device.

    Attributes:
        tokens: image tokens, preview included.
        prefill: of the prompt; the running sequences wait for it.
        step: a decode step, by the number of running sequences.
        denoise: conditioning and denoising; sampled anew for each image.
        finish: the VAE, on the same device as the denoising of the next image.
        encode: the image file, on the host.
        overhead: network and Triton.
    """

    tokens: int
    prefill: float
    step: Callable[[int], float]
    denoise: Callable[[random.Random], float]
    finish: float = 0.0
    encode: float = 0.0
    overhead: float = 0.0


@dataclass(frozen=True)
class Deployment:
    """The devices of the AR and DiT instances; instances that name the same device share it.

    Attributes:
        slots: sequences that an AR instance decodes together.
        cores: tasks that a device runs at full speed; more tasks share it evenly.
        admission: policy of the AR instances, one of ``ar.admission.ADMISSIONS``.
    """

    ar: tuple[str, ...]
    dit: tuple[str, ...]
    slots: int = 8
    cores: float = 1.0
    admission: str = "at_once"


@dataclass(frozen=True)
class Outcome:
    """Times of every request in seconds, in order of arrival."""

    arrived: list[float]
    decoded: list[float]
    denoise_started: list[float]
    answered: list[float]

    @property
    def latencies(self) -> list[float]:
        return [end - begin for begin, end in zip(self.arrived, self.answered, strict=True)]

    @property
    def throughput(self) -> float:
        """Images a second, from the first arrival to the last response."""
        return len(self.answered) / (max(self.answered) - min(self.arrived))


class _Task:
    """Work in progress on a device; ``left`` is in seconds of the device at full speed."""

    def __init__(self, left: float, done: simpy.Event) -> None:
        self.left, self.done = left, done


class SimulatedDevice:
    """Runs ``cores`` tasks at full speed; more tasks share it evenly (processor sharing)."""

    def __init__(self, clock: simpy.Environment, cores: float) -> None:
        self._clock, self._cores = clock, cores
        self._tasks: list[_Task] = []
        self._updated_at = clock.now
        self._schedule = 0

    def work(self, seconds: float) -> _Task:
        """Starts a task; its ``done`` is triggered when it has had ``seconds`` of the device."""
        self._advance()
        task = _Task(seconds, self._clock.event())
        self._tasks.append(task)
        self._reschedule()
        return task

    def left(self, task: _Task) -> float:
        self._advance()
        return task.left

    def shorten(self, task: _Task, seconds: float) -> None:
        self._advance()
        task.left = seconds
        self._reschedule()

    @property
    def _speed(self) -> float:
        return min(1.0, self._cores / len(self._tasks)) if self._tasks else 1.0

    def _advance(self) -> None:
        worked = (self._clock.now - self._updated_at) * self._speed
        self._updated_at = self._clock.now
        for task in self._tasks:
            task.left -= worked

    def _reschedule(self) -> None:
        """Ends finished tasks and sets a timer for the end of the next one."""
        for task in [task for task in self._tasks if task.left <= ROUNDING_SECONDS]:
            self._tasks.remove(task)
            task.done.succeed()
        self._schedule += 1
        if self._tasks:
            schedule, soonest = self._schedule, min(task.left for task in self._tasks)
            self._clock.timeout(soonest / self._speed).callbacks.append(lambda _: self._on_timer(schedule))

    def _on_timer(self, schedule: int) -> None:
        if schedule == self._schedule:
            self._advance()
            self._reschedule()


@dataclass(eq=False)
class _SimulatedSequence:
    """A request in the AR stage; ``left`` counts its remaining decode steps."""

    index: int
    done: simpy.Event
    latest: float = math.inf
    left: int = 0
    since: float = 0.0


class _ArInstance:
    """Continuous batching: sequences are admitted one by one, then all take decode steps together."""

    def __init__(
        self, clock: simpy.Environment, device: SimulatedDevice, deployment: Deployment, costs: StageCosts
    ) -> None:
        self._clock, self._device, self._slots, self._costs = clock, device, deployment.slots, costs
        self._waiting: deque[_SimulatedSequence] = deque()
        self._running: list[_SimulatedSequence] = []
        self._durations = DurationStats()
        self._changed = clock.event()
        self.dit_load = DitLoad(lambda: float(clock.now))
        self._admission: Admission = ImmediateAdmission()
        if deployment.admission == "gathered":
            self._admission = BatchAdmission(self.dit_load, warn=lambda *_: None)
        self._admission.when_changed(self._wake)
        clock.process(self._run())

    def decode(self, index: int) -> simpy.Event:
        """Queues the sequence of a request and returns the event of its end."""
        self._waiting.append(_SimulatedSequence(index, self._clock.event()))
        self._wake()
        return self._waiting[-1].done

    def _wake(self) -> None:
        if not self._changed.triggered:
            self._changed.succeed()

    def _run(self) -> Process:
        while True:
            while not self._running and (seconds := self._admission_wait()):
                yield self._change(seconds)
            while len(self._running) < self._slots and not self._admission_wait():
                admitted = self._waiting.popleft()
                yield self._device.work(self._costs.prefill).done
                admitted.left, admitted.since = self._costs.tokens - 1, self._clock.now  # prefill samples the first
                self._running.append(admitted)
            yield from self._take_steps()
            for sequence in [sequence for sequence in self._running if sequence.left == 0]:
                self._running.remove(sequence)
                self._durations.add((self._clock.now - sequence.since) / max(1, self._costs.tokens - 1))
                self.dit_load.forwarded(sequence.index, 1)
                sequence.done.succeed()

    def _admission_wait(self) -> float:
        """Returns the seconds before the first waiting sequence may be admitted, as ``ar.scheduler`` computes them."""
        if not self._waiting:
            return math.inf
        first, now = self._waiting[0], self._clock.now
        decode_seconds = self._costs.tokens * self._durations.mean
        if first.latest == math.inf:
            first.latest = now + self._admission.max_wait(len(self._running), decode_seconds)
        steps_left = max((sequence.left for sequence in self._running), default=0)
        return self._admission.wait(
            QueueSnapshot(
                now=now,
                waiting=len(self._waiting),
                free=self._slots - len(self._running),
                running=len(self._running),
                extends=max(0.0, 1 - steps_left / self._costs.tokens),
                has_begun=False,
                latest=first.latest,
                deadline=math.inf,
                decode_seconds=decode_seconds,
            )
        )

    def _change(self, seconds: float) -> simpy.Event:
        """Returns the event of an arrival, a report of a DiT instance, or the end of ``seconds``."""
        self._changed = self._clock.event()
        if seconds == math.inf:
            return self._changed
        return self._changed | self._clock.timeout(max(seconds, ROUNDING_SECONDS))

    def _take_steps(self) -> Process:
        """Takes steps until the first sequence ends or another one is admitted to a free slot."""
        count = min(sequence.left for sequence in self._running)
        step = self._costs.step(len(self._running))
        task = self._device.work(count * step)
        while len(self._running) < self._slots and not task.done.triggered:
            yield task.done | self._change(self._admission_wait())
            if not task.done.triggered and not self._admission_wait():
                taken = count - self._device.left(task) / step
                count = min(count, math.ceil(taken - ROUNDING_SECONDS))  # the step in progress is the last before
                self._device.shorten(task, (count - taken) * step)
                break
        yield task.done
        for sequence in self._running:
            sequence.left -= count


@dataclass(eq=False)
class _DitInstance:
    """An instance of the DiT stage, which reports its remaining images whenever their number changes."""

    name: str
    device: SimulatedDevice
    unfinished: simpy.Resource
    finisher: simpy.Resource
    listeners: Sequence[DitLoad]
    left: dict[int, int] = field(default_factory=dict)
    durations: DurationStats = field(default_factory=DurationStats)

    def report(self) -> None:
        """Reports as ``lifecycle.dit_load.DitLoadReporter`` does."""
        requests, mean = list(self.left.items()), self.durations.mean
        for dit_load in self.listeners:
            dit_load.update({"instance": self.name, "requests": requests, "seconds_per_image": mean})


class _SimulatedServer:
    """Both stages and the path of a request through them."""

    def __init__(self, deployment: Deployment, costs: StageCosts, requests: int, seed: int) -> None:
        self.clock = simpy.Environment()
        names = (*deployment.ar, *deployment.dit)
        devices = {name: SimulatedDevice(self.clock, deployment.cores) for name in names}
        self._ar = [_ArInstance(self.clock, devices[name], deployment, costs) for name in deployment.ar]
        loads = [instance.dit_load for instance in self._ar]
        self._free = simpy.Store(self.clock)
        for number, name in enumerate(deployment.dit):
            unfinished, finisher = simpy.Resource(self.clock, UNFINISHED_REQUESTS), simpy.Resource(self.clock, 1)
            self._free.items.append(_DitInstance(str(number), devices[name], unfinished, finisher, loads))
        self._costs = costs
        # Independent of the random numbers of arrivals with the same seed.
        self._random = random.Random(f"work {seed}")
        self.outcome = Outcome(*([math.nan] * requests for _ in range(4)))

    def arrive(self, arrivals: Sequence[float]) -> Process:
        for index, arrival in enumerate(arrivals):
            yield self.clock.timeout(arrival - self.clock.now)
            self.clock.process(self._serve(index))

    def repeat(self, waiting: Iterator[int]) -> Process:
        """Starts a request whenever the previous one is answered (closed loop)."""
        for index in waiting:
            yield self.clock.process(self._serve(index))

    def _serve(self, index: int) -> Process:
        costs, clock, outcome = self._costs, self.clock, self.outcome
        outcome.arrived[index] = clock.now
        yield clock.timeout(costs.overhead)
        yield self._ar[index % len(self._ar)].decode(index)
        outcome.decoded[index] = clock.now
        dit: _DitInstance = yield self._free.get()
        outcome.denoise_started[index] = clock.now
        dit.left[index] = 1
        dit.report()
        yield dit.device.work(costs.denoise(self._random)).done
        dit.durations.add(clock.now - outcome.denoise_started[index])
        dit.left[index] = 0
        dit.report()
        with dit.unfinished.request() as may_wait:
            yield may_wait
            self._free.put(dit)
            with dit.finisher.request() as turn:
                yield turn
                yield dit.device.work(costs.finish).done
                yield clock.timeout(costs.encode)
        del dit.left[index]
        dit.report()
        outcome.answered[index] = clock.now


def simulate(deployment: Deployment, costs: StageCosts, arrivals: Sequence[float], seed: int = 0) -> Outcome:
    """Simulates requests that arrive at given times, ascending (open loop); ``seed`` is that of sampled costs."""
    server = _SimulatedServer(deployment, costs, len(arrivals), seed)
    server.clock.process(server.arrive(arrivals))
    server.clock.run()
    return server.outcome


def saturate(deployment: Deployment, costs: StageCosts, requests: int, seed: int = 0) -> Outcome:
    """Simulates a closed loop that keeps every instance busy: a request for each slot and two for each DiT instance."""
    server = _SimulatedServer(deployment, costs, requests, seed)
    waiting = iter(range(requests))
    for _ in range(deployment.slots * len(deployment.ar) + 2 * len(deployment.dit)):
        server.clock.process(server.repeat(waiting))
    server.clock.run()
    return server.outcome


def poisson_arrivals(rate: float, requests: int, seed: int = 0) -> list[float]:
    """Returns the times of independent arrivals, ``rate`` a second on average."""
    source = random.Random(seed)
    return list(accumulate(source.expovariate(rate) for _ in range(requests)))


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest value that at least ``percent`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

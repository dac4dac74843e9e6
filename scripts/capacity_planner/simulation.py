"""Discrete-event simulation of requests in both stages.

The AR stage decodes several sequences together; sequences join and leave between steps, when its admission policy
admits them. Each DiT instance denoises one image at a time and takes the next one of a common queue when it is free.
Admission is decided by the server's own code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import simpy

from capacity_planner.simulated_ar import ArInstance
from capacity_planner.simulated_ar import Sequence as ArSequence
from capacity_planner.simulated_device import Process, SimulatedDevice
from capacity_planner.simulated_dit import UNFINISHED_REQUESTS
from glm_image.lifecycle.dit_load import DitLoad
from glm_image.lifecycle.durations import DurationStats


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
        self._ar = [
            ArInstance(
                self.clock, devices[name], slots=deployment.slots, admission=deployment.admission, step=costs.step
            )
            for name in deployment.ar
        ]
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
        yield self._ar[index % len(self._ar)].decode(ArSequence(index, costs.tokens, costs.prefill))
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

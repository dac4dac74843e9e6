"""A simulated instance of the AR: continuous batching, with the server's own code for admission."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import simpy

from capacity_planner.simulated_device import ROUNDING_SECONDS, Process, SimulatedDevice, Task
from glm_image.ar.admission import Admission, BatchAdmission, ImmediateAdmission, QueueSnapshot
from glm_image.lifecycle.dit_load import DitLoad
from glm_image.lifecycle.durations import DurationStats


@dataclass(frozen=True)
class Sequence:
    """What an image asks of the AR.

    Attributes:
        index: the number of its request, by which the DiT reports its load.
        tokens: image tokens, preview included.
        prefill: seconds of the prompt; the running sequences wait for it.
        added_step: seconds that it adds to each decode step while it runs, by the keys and values that it reads.
    """

    index: int
    tokens: int
    prefill: float
    added_step: float = 0.0


@dataclass(eq=False)
class _Running:
    """A sequence in the instance; ``left`` counts its remaining decode steps."""

    sequence: Sequence
    done: simpy.Event
    latest: float = math.inf
    left: int = 0
    since: float = 0.0


class ArInstance:
    """Sequences are admitted one by one, then all take decode steps together.

    Args:
        slots: sequences that decode together.
        admission: one of ``ar.admission.ADMISSIONS``.
        step: seconds of a decode step, by the number of running sequences.
    """

    def __init__(
        self,
        clock: simpy.Environment,
        device: SimulatedDevice,
        *,
        slots: int,
        admission: str,
        step: Callable[[int], float],
    ) -> None:
        self._clock, self._device, self._slots, self._step = clock, device, slots, step
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._durations = DurationStats()
        self._changed = clock.event()
        self._task: Task | None = None
        self.dit_load = DitLoad(lambda: float(clock.now))
        self._admission: Admission = ImmediateAdmission()
        if admission == "gathered":
            self._admission = BatchAdmission(self.dit_load, warn=lambda *_: None)
        self._admission.when_changed(self._wake)
        self._process = clock.process(self._run())

    def decode(self, sequence: Sequence) -> simpy.Event:
        """Queues a sequence and returns the event of its end, which fails if the instance is lost."""
        self._waiting.append(_Running(sequence, self._clock.event()))
        self._wake()
        return self._waiting[-1].done

    def stop(self) -> None:
        """Stops computing, as a lost host does; the sequences get no answer until ``fail``."""
        self._process.interrupt()
        if self._task is not None:
            self._device.drop(self._task)

    def fail(self, error: Exception) -> None:
        """Ends the waiting and running sequences with an error."""
        for lost in (*self._waiting, *self._running):
            lost.done.fail(error)
        self._waiting.clear()
        self._running.clear()

    def _wake(self) -> None:
        if not self._changed.triggered:
            self._changed.succeed()

    def _run(self) -> Process:
        try:
            while True:
                while not self._running and (seconds := self._admission_wait()):
                    yield self._change(seconds)
                yield from self._admit()
                yield from self._take_steps()
                self._forward_complete()
        except simpy.Interrupt:
            return

    def _admit(self) -> Process:
        while len(self._running) < self._slots and not self._admission_wait():
            # It waits until its prompt has been read, so that the loss of the instance finds it.
            admitted = self._waiting[0]
            yield self._work(admitted.sequence.prefill).done
            self._waiting.popleft()
            admitted.left, admitted.since = admitted.sequence.tokens - 1, self._clock.now  # prefill samples the first
            self._running.append(admitted)

    def _work(self, seconds: float) -> Task:
        self._task = self._device.work(seconds)
        return self._task

    def _forward_complete(self) -> None:
        for ended in [running for running in self._running if running.left == 0]:
            self._running.remove(ended)
            self._durations.add((self._clock.now - ended.since) / max(1, ended.sequence.tokens - 1))
            self.dit_load.forwarded(ended.sequence.index, 1)
            ended.done.succeed()

    def _admission_wait(self) -> float:
        """Returns the seconds before the first waiting sequence may be admitted, as ``ar.scheduler`` computes them."""
        if not self._waiting:
            return math.inf
        first, now = self._waiting[0], self._clock.now
        tokens = first.sequence.tokens
        decode_seconds = tokens * self._durations.mean
        if first.latest == math.inf:
            first.latest = now + self._admission.max_wait(len(self._running), decode_seconds)
        steps_left = max((running.left for running in self._running), default=0)
        return self._admission.wait(
            QueueSnapshot(
                now=now,
                waiting=len(self._waiting),
                free=self._slots - len(self._running),
                running=len(self._running),
                extends=max(0.0, 1 - steps_left / tokens),
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
        count = min(running.left for running in self._running)
        step = self._step(len(self._running)) + sum(running.sequence.added_step for running in self._running)
        task = self._work(count * step)
        while len(self._running) < self._slots and not task.done.triggered:
            yield task.done | self._change(self._admission_wait())
            if not task.done.triggered and not self._admission_wait():
                taken = count - self._device.left(task) / step
                count = min(count, math.ceil(taken - ROUNDING_SECONDS))  # the step in progress is the last before
                self._device.shorten(task, (count - taken) * step)
                break
        yield task.done
        for running in self._running:
            running.left -= count

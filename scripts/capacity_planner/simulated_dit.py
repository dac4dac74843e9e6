"""A simulated member of a pool that denoises: its queue, the turns of the requests that it holds, its VAE."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import simpy

from capacity_planner.simulated_device import Process, SimulatedDevice, Task
from glm_image.dit.fair_queue import DeficitRoundRobin

HELD_REQUESTS = 4
"""Requests that take turns at the device, ``max_num_requests`` of ``glm_dit``; Triton queues the others."""

UNFINISHED_REQUESTS = 2
"""Images that may wait for the VAE while another is denoised, as in ``dit.engine``."""


@dataclass(frozen=True)
class Rendering:
    """Seconds that an image takes a device alone: ``denoise`` with its conditioning, then ``finish`` for the VAE.

    ``encode`` is the image file, on the host.
    """

    denoise: float
    finish: float = 0.0
    encode: float = 0.0

    @property
    def device_seconds(self) -> float:
        return self.denoise + self.finish


@dataclass(eq=False)
class _Image:
    rendering: Rendering
    done: simpy.Event


class DitMember:
    """Denoises an image at a time, in the order of the server's ``DeficitRoundRobin``."""

    def __init__(self, clock: simpy.Environment, device: SimulatedDevice) -> None:
        self._clock, self._device = clock, device
        self._queue: deque[_Image] = deque()
        self._held: dict[_Image, bool] = {}
        """The images in the model, and whether they are still to be denoised."""
        self._turns: DeficitRoundRobin[_Image] = DeficitRoundRobin()
        self._unfinished = simpy.Resource(clock, UNFINISHED_REQUESTS)
        self._finisher = simpy.Resource(clock, 1)
        self._changed = clock.event()
        self._task: Task | None = None
        self._is_stopped = False
        self._process = clock.process(self._run())

    def render(self, rendering: Rendering) -> simpy.Event:
        """Queues an image and returns the event of its end, which fails if the member is lost."""
        image = _Image(rendering, self._clock.event())
        self._queue.append(image)
        self._wake()
        return image.done

    def stop(self) -> None:
        """Stops computing, as a lost host does; the images get no answer until ``fail``."""
        self._is_stopped = True
        self._process.interrupt()
        if self._task is not None:
            self._device.drop(self._task)

    def fail(self, error: Exception) -> None:
        """Ends the images that the member has with an error."""
        for lost in (*self._queue, *self._held):
            lost.done.fail(error)
        self._queue.clear()
        self._held.clear()

    def _wake(self) -> None:
        if not self._changed.triggered:
            self._changed.succeed()

    def _next(self) -> _Image | None:
        while self._queue and len(self._held) < HELD_REQUESTS:
            image = self._queue.popleft()
            self._held[image] = True
            self._turns.add(image)
        return self._turns.next({image: image.rendering.denoise for image, waits in self._held.items() if waits})

    def _run(self) -> Process:
        try:
            while True:
                while (image := self._next()) is None:
                    self._changed = self._clock.event()
                    yield self._changed
                self._task = self._device.work(image.rendering.denoise)
                yield self._task.done
                self._turns.remove(image)
                self._held[image] = False
                unfinished = self._unfinished.request()
                yield unfinished
                self._clock.process(self._finish(image, unfinished))
        except simpy.Interrupt:
            return

    def _finish(self, image: _Image, unfinished: simpy.resources.resource.Request) -> Process:
        with unfinished, self._finisher.request() as turn:
            yield turn
            yield self._device.work(image.rendering.finish).done
            yield self._clock.timeout(image.rendering.encode)
        if not self._is_stopped:
            del self._held[image]
            image.done.succeed()
            self._wake()

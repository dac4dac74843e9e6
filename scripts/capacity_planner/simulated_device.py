"""Simulated time and devices."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy

Process = Generator[simpy.Event, Any, None]

ROUNDING_SECONDS = 1e-9
"""Remaining work that is only the rounding of a float."""


class Task:
    """Work in progress on a device; ``left`` is in seconds of the device at full speed."""

    def __init__(self, left: float, done: simpy.Event) -> None:
        self.left, self.done = left, done


class SimulatedDevice:
    """Runs ``cores`` tasks at full speed; more tasks share it evenly (processor sharing)."""

    def __init__(self, clock: simpy.Environment, cores: float) -> None:
        self._clock, self._cores = clock, cores
        self._tasks: list[Task] = []
        self._updated_at = clock.now
        self._schedule = 0

    def work(self, seconds: float) -> Task:
        """Starts a task; its ``done`` is triggered when it has had ``seconds`` of the device."""
        self._advance()
        task = Task(seconds, self._clock.event())
        self._tasks.append(task)
        self._reschedule()
        return task

    def left(self, task: Task) -> float:
        self._advance()
        return task.left

    def shorten(self, task: Task, seconds: float) -> None:
        self._advance()
        task.left = seconds
        self._reschedule()

    def drop(self, task: Task) -> None:
        """Ends the work on a task, whose ``done`` is never triggered."""
        self._advance()
        if task in self._tasks:
            self._tasks.remove(task)
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

#!/usr/bin/env python3
"""Measures what the bus costs a decode step, in JSON lines: alone, and in the host's time of whole steps.

    bus.py [--requests 8] [--step-ms 6.3]

The scheduler, the jobs, the node and the listeners are a server's; only the executor computes nothing, so that nothing
but the host's time is left. Runs on any machine, without a checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from measure import say
from numpy.typing import NDArray

from glm_image.ar.commands import Command, Release, Step
from glm_image.ar.scheduler import Scheduler
from glm_image.ar.sequence import Request, Running, report_progress
from glm_image.ipc import EventListener, IpcServer
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, ResolvedRequest, Sampling
from glm_image.request.stages import Stage

REPORTS, REPEATS = 20_000, 5


class Clock:
    """An executor that computes nothing, and when it took its first and its last step."""

    def __init__(self) -> None:
        self.steps, self.first, self.last = 0, 0.0, 0.0

    def run(self, command: Command) -> NDArray[np.int32] | None:
        """Notes the time of a step."""
        if isinstance(command, Step):
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.steps += 1
        return np.zeros(1, dtype=np.int32) if isinstance(command, Release) else None


@contextmanager
def in_flight(jobs: list[RequestContext], listened: int) -> Iterator[None]:
    """The jobs as a server has them, the first ones listened to."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        kept, heard = RequestRegistry(RequestState.FORWARDED), threading.Semaphore(0)

        def note(topic: bytes, listens: bool) -> None:
            (kept.watch if listens else kept.unwatch)(topic)
            heard.release()

        node = IpcServer(Path(folder), "glm_ar_0", {}, note)
        stack.callback(node.close)
        kept.publish = node.publish
        for job in jobs:
            job.add_observer(kept)
            job.start(Stage.AR_QUEUE)
        for job in jobs[:listened]:
            stack.enter_context(EventListener(Path(folder), job.id))
            heard.acquire()
        yield


def report_seconds(jobs: list[RequestContext], resolved: ResolvedRequest) -> float:
    """What telling of all the jobs takes after a step; the least of some rounds."""
    running = [Running(Request(job, (), resolved, 0.0), 0, 1, 0.0) for job in jobs]
    for one in running:
        one.request.job.progress = one.request.drawn.progress
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(REPORTS):
            report_progress(running)
        taken.append((time.perf_counter() - began) / REPORTS)
    return min(taken)


def step_seconds(jobs: list[RequestContext], resolved: ResolvedRequest) -> float:
    """The host's time of a step of all the jobs, decoded by a scheduler."""
    clock, seen = Clock(), []
    admitted = threading.Event()

    def run(command: Command) -> NDArray[np.int32] | None:
        admitted.wait()  # so that all of them are there from the first step on
        return clock.run(command)

    scheduler = Scheduler(run, len(jobs), len(jobs))
    for job in jobs:
        seen.append(scheduler.submit(job, (), resolved))
    admitted.set()
    for future in seen:
        future.result()
    scheduler.close()
    return (clock.last - clock.first) / (clock.steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what the bus costs a decode step.")
    parser.add_argument("--requests", type=int, default=8, help="in the batch (%(default)s)")
    parser.add_argument("--step-ms", type=float, default=6.3, help="a step on the device (%(default)s)")
    flags = parser.parse_args()
    asked = GenerationParameters("a fox", height=2048, width=2048, seed=1)
    resolved = asked.resolve(Limits(), Sampling(0.9, 0.75, 16384))
    ways = {"nobody listens": 0, "somebody listens to one": 1, "all are listened to": flags.requests}

    def new_jobs() -> list[RequestContext]:
        return [RequestContext() for _ in range(flags.requests)]

    without = min(step_seconds(new_jobs(), resolved) for _ in range(REPEATS))
    say("host's step without a bus", requests=flags.requests, us=without * 1e6)
    for name, listened in ways.items():
        jobs = new_jobs()
        with in_flight(jobs, listened):
            report = report_seconds(jobs, resolved)
        whole = []
        for _ in range(REPEATS):
            jobs = new_jobs()
            with in_flight(jobs, listened):
                whole.append(step_seconds(jobs, resolved))
        say(
            f"a step's reports, {name}",
            requests=flags.requests,
            us=report * 1e6,
            percent_of_step=100 * report * 1e3 / flags.step_ms,
            host_step_us=min(whole) * 1e6,
            more_than_without_us=(min(whole) - without) * 1e6,
        )


if __name__ == "__main__":
    main()

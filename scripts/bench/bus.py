#!/usr/bin/env python3
"""Measures what progress events cost a decode step, alone and in the host's time of whole steps. Prints JSON lines.

    scripts/bench/bus.py [--requests 8] [--step-ms 6.3]

The scheduler, the requests, the IPC server and the subscribers are those of a server; the executor computes nothing, so
that only the host's time is left. Runs on any machine, without a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measure import new_parser, parse, report
from timing import open_benchmark_device, report_ceilings

from glm_image.ar.commands import Release, Step
from glm_image.ar.scheduler import Scheduler
from glm_image.ar.scheduler_thread import SchedulerThread
from glm_image.ar.sequence import Request
from glm_image.ipc.client import EventListener
from glm_image.ipc.server import IpcServer
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, ResolvedRequest, Sampling
from glm_image.request.stages import Stage

SIDE = 2048
SAMPLING = Sampling(0.9, 0.75, 16384)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser("bus.py", __doc__)
    parser.add_argument("--requests", type=int, default=8, help="in the batch (%(default)s)")
    parser.add_argument("--step-ms", type=float, default=6.3, help="a step on the device (%(default)s)")
    parser.add_argument("--side", type=int, default=SIDE, help="of the images, which sets the steps (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each figure, the least counts (%(default)s)")
    return parse(parser, arguments, {"requests": 3, "side": 256, "repeats": 1})


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    report_ceilings(open_benchmark_device("cpu"), brief=True)
    resolved = GenerationParameters("a fox", height=flags.side, width=flags.side, seed=1).resolve(Limits(), SAMPLING)
    without = step_seconds(flags, resolved, None)
    report("host's step without events", requests=flags.requests, us=without * 1e6)
    cases = {"no subscriber": 0, "a subscriber to one request": 1, "a subscriber to each": flags.requests}
    for name, subscribers in cases.items():
        step = step_seconds(flags, resolved, subscribers)
        report(
            f"a step's events, {name}",
            requests=flags.requests,
            host_step_us=step * 1e6,
            added_us=(step - without) * 1e6,
            percent_of_step=100 * (step - without) * 1e3 / flags.step_ms,
        )
    return 0


class StepClock:
    """An executor that computes nothing, and records when it ran its first and its latest step."""

    def __init__(self) -> None:
        self.steps, self.first, self.latest = 0, 0.0, 0.0
        self.may_begin = threading.Event()

    def run(self, command: Any) -> Any:
        self.may_begin.wait()  # until all requests are queued, so that they run together from the first step on
        if isinstance(command, Step):
            self.latest = time.perf_counter()
            self.first = self.first or self.latest
            self.steps += 1
        return np.zeros(1, dtype=np.int32) if isinstance(command, Release) else None


@contextmanager
def registered(contexts: Sequence[RequestContext], subscribers: int | None) -> Iterator[None]:
    """The requests in the registry of an instance, the first ones with a subscriber each; None = no registry."""
    if subscribers is None:
        yield
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server, subscribed = IpcServer(), threading.Semaphore(0)
        registry = RequestRegistry(RequestState.FORWARDED, server.publish)

        def on_subscription(topic: bytes, begins: bool) -> None:
            (registry.watch if begins else registry.unwatch)(topic)
            subscribed.release()

        server.start(Path(folder), "glm_ar_0", {}, on_subscription)
        stack.callback(server.close)
        for context in contexts:
            context.add_observer(registry)
            context.start(Stage.AR_QUEUE)
        for context in contexts[:subscribers]:
            stack.enter_context(EventListener(Path(folder), context.id))
            subscribed.acquire()
        yield


def step_seconds(flags: argparse.Namespace, resolved: ResolvedRequest, subscribers: int | None) -> float:
    """Returns the host's time of a step of all the requests, decoded by a scheduler; the least of some rounds."""
    times = []
    for _ in range(flags.repeats):
        contexts = [RequestContext() for _ in range(flags.requests)]
        with registered(contexts, subscribers):
            times.append(round_seconds(contexts, resolved))
    return min(times)


def round_seconds(contexts: Sequence[RequestContext], resolved: ResolvedRequest) -> float:
    """Returns the host's mean time of a step from the first to the latest of some requests."""
    clock = StepClock()
    scheduler = SchedulerThread(Scheduler(clock.run, len(contexts), len(contexts)))
    futures = [scheduler.submit(Request(context, (), resolved)) for context in contexts]
    clock.may_begin.set()
    for future in futures:
        future.result()
    scheduler.close()
    return (clock.latest - clock.first) / (clock.steps - 1)


if __name__ == "__main__":
    sys.exit(main())

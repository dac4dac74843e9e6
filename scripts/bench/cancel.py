#!/usr/bin/env python3
"""Measures how soon a cancelled request frees its device, and what happens when memory runs out. Prints JSON lines.

    scripts/bench/cancel.py --checkpoint FULL --size 1024x1024 [--stage ar] [--memory]

``--memory`` fills the device's memory but for a little and sends a request, which must fail with an error that says
so; then it frees the memory and sends the request again, which must succeed with the same result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from images import dit_request, grid_of, render
from measure import PROMPT, engine_parser, parse, report, size_name
from timing import open_benchmark_device, report_ceilings

from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.dit.engine import DitEngine
from glm_image.dit.metrics import STEP_SECONDS
from glm_image.dit.settings import DitSettings
from glm_image.errors import CancelledError, DeviceMemoryError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.request.geometry import Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters
from glm_image.request.stages import Stage
from glm_image.telemetry.metrics import MetricSpec

LEFT_BYTES = 64 << 20
CANCEL_AFTER_TOKENS = 50
OTHER_SEQUENCES = 7
MEMORY_STEPS = 20
BRIEF = {"sizes": "64x64", "repeats": 2}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("cancel.py", __doc__)
    parser.add_argument("--stage", choices=("ar", "dit", "both"), default="both", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, 2 or more (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="cancelled requests of each stage (%(default)s)")
    parser.add_argument("--memory", action="store_true", help="also fill the device's memory; not on a CPU")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    if flags.memory and device.is_host:
        print(f"error: --memory fills the device's memory, and {device} has the host's", file=sys.stderr)
        return 2
    report_ceilings(device, brief=flags.brief)
    checkpoint, size = Checkpoint.open(flags.checkpoint, flags.load_format), flags.sizes[0]
    report("request", size=size_name(size), steps=flags.steps)
    works: list[Callable[[], Any]] = []
    if flags.stage != "dit":
        ar = ArEngine(checkpoint, device, ArSettings())
        measure_ar(ar, size, flags.repeats)
        works.append(lambda: tokens_of(ar, size))
    if flags.stage != "ar":
        ends = StepEnds()
        dit = DitEngine(checkpoint, device, DitSettings(), ends)
        measure_dit(dit, ends, size, flags.steps, flags.repeats)
        request = dit_request(grid_of(size), MEMORY_STEPS, dit.codebook_size)
        works.append(lambda: render(dit, request).pixels)
    if flags.memory:
        for work in works:
            measure_memory(device, work)
    if flags.stage != "dit":
        ar.close()
    if flags.stage != "ar":
        dit.close()
    return 0


def reached(context: RequestContext, stage: Stage, done: int) -> threading.Event:
    """Returns an event that is set when the request has come that far in a stage."""
    event = threading.Event()

    def on_progress(progress: Progress) -> None:
        if progress.stage is stage and progress.done >= done:
            event.set()

    context.add_observer(ProgressCallback(on_progress))
    return event


def report_steps(measure: str, waits: Sequence[float], step: float) -> None:
    report(
        measure,
        median_ms=1000 * statistics.median(waits),
        worst_ms=1000 * max(waits),
        step_ms=1000 * step,
        worst_steps=max(waits) / step,
    )


def expect_cancelled(error: BaseException | None) -> None:
    """Checks that a request ended because it was cancelled."""
    if not isinstance(error, CancelledError):
        raise SystemExit(f"a cancelled request ended with {error!r}; expected: CancelledError")


def measure_ar(engine: ArEngine, size: Size, repeats: int) -> None:
    """Cancels one of eight sequences at different moments of a step, and one that waits for a slot."""
    parameters = GenerationParameters(PROMPT, height=size.height, width=size.width, seed=1)
    resolved = parameters.resolve(Limits(), engine.sampling)
    others = [engine.submit(RequestContext(), resolved) for _ in range(OTHER_SEQUENCES)]
    waits, queued_waits = list[float](), list[float]()
    for index in range(repeats):
        context, queued_context = RequestContext(), RequestContext()
        has_begun = reached(context, Stage.DECODE, CANCEL_AFTER_TOKENS)
        running = engine.submit(context, resolved)
        has_begun.wait()
        queued = engine.submit(queued_context, resolved)
        time.sleep(0.0011 * index)  # at another moment of a step each time
        for cancelled, future, kept in ((queued_context, queued, queued_waits), (context, running, waits)):
            started = time.perf_counter()
            cancelled.cancel()
            expect_cancelled(future.exception())
            kept.append(time.perf_counter() - started)
    for future in others:
        future.result()
    context = RequestContext()
    engine.submit(context, resolved).result()
    step = context.seconds[Stage.DECODE] / (sum(grid.tokens for grid in resolved.grids) - 1)
    report_steps("cancel to free slot", waits, step)
    report_steps("cancel to answer in the queue", queued_waits, step)


class StepEnds:
    """A metric sink that keeps when the latest denoising step ended, and the seconds of the longest."""

    def __init__(self) -> None:
        self.latest = self.longest = 0.0

    def __call__(self, metric: MetricSpec, value: float, times: int = 1, /) -> None:
        """See ``telemetry.metrics.MetricSink``."""
        if metric is STEP_SECONDS:
            self.latest, self.longest = time.perf_counter(), max(self.longest, value)


def measure_dit(engine: DitEngine, ends: StepEnds, size: Size, steps: int, repeats: int) -> None:
    """Cancels a request at different moments of a denoising step."""
    request = dit_request(grid_of(size), steps, engine.codebook_size)
    denoise = render(engine, request).denoise_seconds
    step, ends.longest = denoise / steps, 0.0
    waits, after_step = [], []
    with ThreadPoolExecutor(1) as pool:
        for index in range(repeats):
            context = RequestContext()
            has_begun = reached(context, Stage.DENOISE, max(1, steps // 5))
            future = pool.submit(render, engine, request, context)
            has_begun.wait()
            time.sleep(step * index / repeats)  # at another moment of a step each time
            started = time.perf_counter()
            context.cancel()
            expect_cancelled(future.exception())
            ended = time.perf_counter()
            waits.append(ended - started)
            after_step.append(ended - ends.latest)
    report("denoising", seconds=denoise, steps=steps)
    report_steps("cancel to free device", waits, step)
    report("step under way to free device", longest_step_ms=1000 * ends.longest, worst_ms=1000 * max(after_step))


def tokens_of(engine: ArEngine, size: Size) -> Any:
    """Returns the tokens of a request with a long prompt."""
    parameters = GenerationParameters("a fox " * 1000, height=size.height, width=size.width, seed=1)
    resolved = parameters.resolve(Limits(), engine.sampling)
    return engine.submit(RequestContext(), resolved).result().prior_token_ids


def fill(device: Device) -> list[torch.Tensor]:
    """Takes all of a device's memory but ``LEFT_BYTES``, in pieces of decreasing size."""
    tensors, piece = [], 1 << 30
    while piece >= LEFT_BYTES:
        try:
            device.release_unused()
            if device.memory().free < piece + LEFT_BYTES:
                raise torch.OutOfMemoryError
            tensors.append(torch.empty(piece, dtype=torch.uint8, device=device.torch_device))
        except torch.OutOfMemoryError:
            piece //= 2
    return tensors


def measure_memory(device: Device, work: Callable[[], Any]) -> None:
    """Does some work with the memory full, which must fail, and again with it free, which must give the same."""
    before = work()
    free = device.memory().free
    filled = fill(device)
    for _ in range(2):
        try:
            work()
        except DeviceMemoryError as error:
            report("memory full", left_mb=device.memory().free / 1e6, message=str(error))
        else:
            raise SystemExit("the memory was full, and the request succeeded")
    filled.clear()
    device.release_unused()
    same = bool(np.array_equal(work(), before))
    report("memory free again", same=same, lost_mb=(free - device.memory().free) / 1e6)


if __name__ == "__main__":
    sys.exit(main())

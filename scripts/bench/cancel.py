#!/usr/bin/env python3
"""Measures how soon a cancelled request of an engine is gone, and what becomes of one that the memory is too small for.

    cancel.py --checkpoint DIR [--load-format dummy] [--device cuda:0] [--size 1024x1024] [--stage ar] [--memory]

Prints a JSON line a measure. ``--memory`` fills the memory but for a little, asks for a picture, which must end
with an error that says so, frees what filled it, and asks again, which must succeed.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from measure import arguments, say

from glm_image.ar.engine import ArEngine, ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.open import instance_device, open_device
from glm_image.dit.engine import DitEngine, DitSettings
from glm_image.dit.metrics import STEP_SECONDS
from glm_image.errors import CancelledError, DeviceMemoryError
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.request import geometry
from glm_image.request.geometry import Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, PaintRequest
from glm_image.telemetry.metrics import MetricSpec

REPEATS = 7
LEFT_BYTES = 64 << 20


def cancel_after(context: RequestContext, stage: str, done: int) -> threading.Event:
    """Has the job reported to be at a point, which is when the returned event is set."""
    there = threading.Event()

    def note(progress: Progress) -> None:
        if progress.stage == stage and progress.done >= done:
            there.set()

    context.add_observer(ProgressCallback(note))
    return there


def say_steps(measure: str, waits: list[float], step: float) -> None:
    say(
        measure,
        median_ms=1000 * statistics.median(waits),
        worst_ms=1000 * max(waits),
        step_ms=1000 * step,
        worst_steps=max(waits) / step,
    )


def measure_ar(engine: ArEngine, size: Size) -> None:
    """Cancels one of eight sequences at different moments of a step, and one that waits."""
    asked = GenerationParameters("a fox", height=size.height, width=size.width, seed=1)
    resolved = asked.resolve(Limits(), engine.sampling)
    beside = [engine.submit(RequestContext(), resolved) for _ in range(7)]
    waits, waits_queued = [], []
    for index in range(REPEATS):
        context = RequestContext()
        there = cancel_after(context, "decode", 50)
        answer = engine.submit(context, resolved)
        there.wait()
        queued_job = RequestContext()
        queued = engine.submit(queued_job, resolved)
        time.sleep(0.0011 * index)
        for one, future, kept in ((queued_job, queued, waits_queued), (context, answer, waits)):
            began = time.perf_counter()
            one.cancel()
            assert isinstance(future.exception(), CancelledError)
            kept.append(time.perf_counter() - began)
    for future in beside:
        future.result()
    context = RequestContext()
    engine.submit(context, resolved).result()
    step = context.seconds["decode"] / (sum(grid.tokens for grid in resolved.grids) - 1)
    say_steps("cancel to free slot", waits, step)
    say_steps("cancel to answer in the queue", waits_queued, step)


def paint_request(size: Size, steps: int) -> PaintRequest:
    grid = geometry.target_grid(geometry.generated_size(size))
    tokens = np.zeros((1, grid.tokens), dtype=np.int32)
    return PaintRequest("a fox", tokens, grid, size, (1,), num_inference_steps=steps)


class StepEnds:
    """Takes what the second stage records, and keeps when its latest step ended and how long its longest one took."""

    def __init__(self) -> None:
        self.latest = self.longest = 0.0

    def __call__(self, measure: MetricSpec, value: float, times: int = 1, /) -> None:
        """See ``measures.MetricSink``."""
        if measure is STEP_SECONDS:
            self.latest, self.longest = time.perf_counter(), max(self.longest, value)


def measure_dit(engine: DitEngine, ends: StepEnds, size: Size) -> None:
    """Cancels a painting at different moments of a step."""
    request, waits, after_step = paint_request(size, 50), [], []
    whole = RequestContext()
    engine.paint(whole, request, Limits()).result()
    step, ends.longest = whole.seconds["denoise"] / 50, 0.0
    with ThreadPoolExecutor(1) as pool:
        for index in range(REPEATS):
            context = RequestContext()
            there = cancel_after(context, "denoise", 10)
            answer = pool.submit(engine.paint, context, request, Limits())
            there.wait()
            time.sleep(step * index / REPEATS)
            began = time.perf_counter()
            context.cancel()
            assert isinstance(answer.exception(), CancelledError)
            ended = time.perf_counter()
            waits.append(ended - began)
            after_step.append(ended - ends.latest)
    say("denoising", seconds=whole.seconds["denoise"], steps=50)
    say_steps("cancel to free device", waits, step)
    say("step under way to free device", longest_step_ms=1000 * ends.longest, worst_ms=1000 * max(after_step))


def fill(device: Device) -> list[torch.Tensor]:
    """Takes all of a device's memory but ``LEFT_BYTES``, in pieces that get smaller."""
    taken, piece = [], 1 << 30
    while piece >= LEFT_BYTES:
        try:
            device.release_unused()
            if device.memory().free < piece + LEFT_BYTES:
                raise torch.OutOfMemoryError
            taken.append(torch.empty(piece, dtype=torch.uint8, device=device.torch_device))
        except torch.OutOfMemoryError:
            piece //= 2
    return taken


def measure_memory(device: Device, ar: ArEngine | None, dit: DitEngine | None, size: Size) -> None:
    """Fills the memory and asks: an error; frees it and asks again: the same picture as before."""
    prompt = GenerationParameters("a fox " * 1000, height=size.height, width=size.width, seed=1)

    def tokens(engine: ArEngine) -> np.ndarray:
        return engine.submit(RequestContext(), prompt.resolve(Limits(), engine.sampling)).result().prior_token_ids

    def pixels(engine: DitEngine) -> np.ndarray:
        request = paint_request(size, 20)
        return engine.paint(RequestContext(), request, Limits()).result().pixels

    works = ([partial(tokens, ar)] if ar else []) + ([partial(pixels, dit)] if dit else [])
    for work in works:
        before = work()
        free = device.memory().free
        filled = fill(device)
        for _ in range(2):
            try:
                work()
            except DeviceMemoryError as error:
                say("memory full", left_mb=device.memory().free / 1e6, message=str(error))
            else:
                raise SystemExit("the memory was full, and the request succeeded")
        filled.clear()
        device.release_unused()
        say("memory free again", same=bool((work() == before).all()), lost_mb=(free - device.memory().free) / 1e6)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--size", default="1024x1024", metavar="WxH")
    parser.add_argument("--stage", choices=("ar", "dit", "both"), default="both")
    parser.add_argument("--memory", action="store_true", help="fill the device's memory")
    flags: argparse.Namespace = parser.parse_args()
    width, height = map(int, flags.size.split("x"))
    size = Size(height, width)
    device = open_device(instance_device(flags.device, 0))
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    ar = ArEngine(checkpoint, device, ArSettings()) if flags.stage != "dit" else None
    if ar is not None:
        measure_ar(ar, size)
    ends = StepEnds()
    dit = DitEngine(checkpoint, device, DitSettings(), ends) if flags.stage != "ar" else None
    if dit is not None:
        measure_dit(dit, ends, size)
    if flags.memory:
        measure_memory(device, ar, dit, size)
    if ar is not None:
        ar.close()


if __name__ == "__main__":
    main()

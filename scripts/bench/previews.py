#!/usr/bin/env python3
"""Measures what the pictures on the way to a picture cost the second stage, in JSON lines.

    previews.py --checkpoint DIR [--load-format dummy] [--device cuda:0] [--size 1024x1024] [--steps 50]

A sketch: what it takes on the engine's thread, against a step; somebody listens to all of them over the bus, as
``glm_image_stream`` does. A preview: its seconds and their parts, against the picture's; and a picture with one painted
between its steps, against one without.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import arguments, say

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import instance_device, open_device
from glm_image.dit.commands import Estimate, Prepare, Step
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.ipc import EventListener, IpcServer
from glm_image.ipc.protocol import Event
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.lifecycle.preview_rpc import EstimatePublisher
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.geometry import Grid, Size, generated_size, painted_size, preview_grid, target_grid
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest
from glm_image.request.stages import Stage

PREVIEW_STEPS = 6
PROMPT = "A red fox reading a newspaper that says 'NEWS'"


class Clocks:
    """The seconds of every command that the engine's threads run, by its kind; what it took to tell of a sketch."""

    def __init__(self) -> None:
        self.of: dict[str, list[float]] = defaultdict(list)

    def watched(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Returns ``run`` with a clock."""

        def timed(command: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(command)
            finally:
                name = type(command).__name__
                is_shown = isinstance(command, Step) and command.for_estimate
                self.of[f"{name} before a sketch" if is_shown else name].append(time.perf_counter() - began)

        return timed

    def take(self) -> dict[str, list[float]]:
        """Returns what was measured since the last call."""
        taken, self.of = self.of, defaultdict(list)
        return taken


def request_of(grid: Grid, steps: int, codebook_size: int) -> PaintRequest:
    tokens = np.random.default_rng(0).integers(0, codebook_size, (1, grid.tokens), dtype=np.int32)
    return PaintRequest(PROMPT, tokens, grid, painted_size(grid), (1,), num_inference_steps=steps)


class TimedRegistry(RequestRegistry):
    """A registry that measures how long publishing an estimate takes the engine's thread."""

    def __init__(self, clocks: Clocks) -> None:
        super().__init__(RequestState.FINISHED)
        self._clocks = clocks

    def publish_details(self, context: RequestContext, details: Callable[[], Event]) -> None:
        """Publishes and measures."""
        began = time.perf_counter()
        super().publish_details(context, details)
        self._clocks.of["telling of a sketch"].append(time.perf_counter() - began)


@contextmanager
def listened(context: RequestContext, clocks: Clocks, heard: list[object]) -> Iterator[None]:
    """The job on the bus of an instance, its sketches taken by a listener."""
    with tempfile.TemporaryDirectory() as folder:
        registry, is_there, ended = TimedRegistry(clocks), threading.Event(), threading.Event()

        def note(topic: bytes, listens: bool) -> None:
            (registry.watch if listens else registry.unwatch)(topic)
            is_there.set()

        node = IpcServer(Path(folder), "glm_dit_0", {}, note)
        registry.publish = node.publish
        context.add_observer(registry)
        context.add_observer(EstimatePublisher(registry))
        context.start(Stage.CONDITION)

        def listen() -> None:
            with EventListener(Path(folder), context.id) as listener:
                while not ended.is_set():
                    heard.extend(event["estimate"] for event in listener.events(0.05) if "estimate" in event)

        listening = threading.Thread(target=listen)
        listening.start()
        is_there.wait()
        try:
            yield
        finally:
            ended.set()
            listening.join()
            node.close()


def denoise(engine: DitEngine, context: RequestContext, request: PaintRequest) -> float:
    """Paints; returns the seconds of its steps, and all that is done between them."""
    engine.paint(context, request, Limits()).result()
    return context.seconds["denoise"]


def measure_sketches(engine: DitEngine, clocks: Clocks, request: PaintRequest, plain: float) -> None:
    """A picture with a sketch after every step but the last."""
    context, heard = RequestContext(estimate_every=1), list[object]()
    clocks.take()
    with listened(context, clocks, heard):
        whole = denoise(engine, context, request)
    taken = clocks.take()
    step = statistics.median(taken["Step before a sketch"])
    sketch, telling = (statistics.median(taken[name]) for name in (Estimate.__name__, "telling of a sketch"))
    say(
        "a sketch, on the engine's thread",
        sketch_ms=sketch * 1e3,
        telling_ms=telling * 1e3,
        worst_ms=1e3 * (max(taken[Estimate.__name__]) + max(taken["telling of a sketch"])),
        step_ms=step * 1e3,
        percent_of_step=100 * (sketch + telling) / step,
        sketches=len(taken[Estimate.__name__]),
        heard=len(heard),
    )
    say("a picture with a sketch every step", denoise_seconds=whole, without_seconds=plain, cost=whole / plain - 1)


def measure_preview(engine: DitEngine, clocks: Clocks, request: PaintRequest, picture: float) -> None:
    """A preview while nothing else is painted."""
    engine.preview(RequestContext(), request).result()  # its size's first
    clocks.take()
    began = time.perf_counter()
    engine.preview(RequestContext(), request).result()
    seconds, taken = time.perf_counter() - began, clocks.take()
    say(
        "a preview, alone",
        size=f"{request.requested.width}x{request.requested.height}",
        steps=request.num_inference_steps,
        seconds=seconds,
        **{f"{name.lower()}_seconds": sum(taken[name]) for name in (Prepare.__name__, Step.__name__, "Decode")},
        picture_seconds=picture,
        percent_of_picture=100 * seconds / picture,
    )


def measure_beside(engine: DitEngine, request: PaintRequest, preview: PaintRequest, plain: float) -> None:
    """A picture with a preview painted between its steps, as in a steady stream of requests."""
    asked, done = list[Callable[[], object]](), list[float]()

    def ask(progress: Progress) -> None:
        if not asked:
            began, future = time.perf_counter(), engine.preview(RequestContext(), preview)
            future.add_done_callback(lambda _: done.append(time.perf_counter() - began))
            asked.append(future.result)

    whole = denoise(engine, RequestContext(observers=(ProgressCallback(ask),)), request)
    asked[0]()
    say(
        "a picture with a preview between its steps",
        denoise_seconds=whole,
        without_seconds=plain,
        cost=whole / plain - 1,
        preview_answered_seconds=done[0],
    )


def main(flags: argparse.Namespace) -> None:
    width, height = map(int, flags.size.split("x"))
    device = open_device(instance_device(flags.device, 0))
    clocks = Clocks()
    target = target_grid(generated_size(Size(height, width)))
    engine = DitEngine(
        Checkpoint.open(flags.checkpoint, flags.load_format),
        device,
        DitSettings(warmup_sizes=(painted_size(target),)),
        watched=clocks.watched,
    )
    request = request_of(target, flags.steps, engine.codebook_size)
    preview = request_of(preview_grid(target), PREVIEW_STEPS, engine.codebook_size)
    denoise(
        engine, RequestContext(), replace(request, num_inference_steps=min(flags.steps, 10))
    )  # captures, warms the card
    context = RequestContext()
    plain = denoise(engine, context, request)
    picture = plain + context.seconds["condition"] + context.seconds["vae"]
    say("a picture", size=flags.size, steps=flags.steps, denoise_seconds=plain, whole_seconds=picture)
    measure_sketches(engine, clocks, request, plain)
    measure_preview(engine, clocks, preview, picture)
    measure_beside(engine, request, preview, plain)
    engine.close()


if __name__ == "__main__":
    parser = arguments("Measures what sketches and previews cost the second stage.")
    parser.add_argument("--size", default="1024x1024", metavar="WxH", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    main(parser.parse_args())

#!/usr/bin/env python3
"""Measures what intermediate images cost the DiT engine. Prints JSON lines.

    scripts/bench/previews.py --checkpoint FULL --size 1024x1024 --steps 50

A latent preview: its time on the engine's thread, against a step, with a subscriber that receives all of them over
IPC, as ``glm_image_stream`` does. A preview image: its seconds by stage, against the image's; and an image with a
preview denoised between its steps, against one without.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from images import dit_request, grid_of, render
from measure import engine_parser, parse, report, size_name
from timing import CommandClock, open_benchmark_device, report_ceilings

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.dit.commands import Decode, Estimate, Prepare, Step
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.ipc.client import EventListener
from glm_image.ipc.protocol import Event, Publish
from glm_image.ipc.server import IpcServer
from glm_image.lifecycle.context import Progress, ProgressCallback, RequestContext
from glm_image.lifecycle.preview_rpc import LatentPreviewPublisher
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.geometry import preview_grid, rendered_size
from glm_image.request.limits import DEFAULT_LIMITS
from glm_image.request.parameters import PaintRequest
from glm_image.request.stages import Stage

PREVIEW_STEPS = 6
WARM_UP_STEPS = 10
PUBLISHING = "publishing an estimate"
BRIEF = {"sizes": "64x64", "steps": 3}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("previews.py", __doc__)
    parser.add_argument("--steps", type=int, default=50, help="2 or more (%(default)s)")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    report_ceilings(device, brief=flags.brief)
    clock, grid = CommandClock(device), grid_of(flags.sizes[0])
    settings = DitSettings(warmup_sizes=(rendered_size(grid),))
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    engine = DitEngine(checkpoint, device, settings, watched=clock.wrap)
    request = dit_request(grid, flags.steps, engine.codebook_size)
    preview = dit_request(preview_grid(grid), min(PREVIEW_STEPS, flags.steps), engine.codebook_size)
    render(engine, replace(request, num_inference_steps=min(flags.steps, WARM_UP_STEPS)))
    image = render(engine, request)
    parts = image.context.seconds
    whole = parts[Stage.DENOISE] + parts[Stage.CONDITION] + parts[Stage.VAE]
    named = {"size": size_name(grid), "steps": flags.steps}
    report("an image", **named, denoise_seconds=image.denoise_seconds, whole_seconds=whole)
    measure_latent_previews(engine, clock, request, image.denoise_seconds)
    measure_preview(engine, clock, preview, whole)
    measure_interleaved(engine, request, preview, image.denoise_seconds)
    engine.close()
    return 0


class TimedRegistry(RequestRegistry):
    """A registry that times how long publishing a latent preview takes the engine's thread."""

    def __init__(self, publish: Publish, clock: CommandClock) -> None:
        super().__init__(RequestState.FINISHED, publish)
        self._clock = clock

    def publish_details(self, context: RequestContext, details: Callable[[], Event]) -> None:
        with self._clock.timed(PUBLISHING):
            super().publish_details(context, details)


@contextmanager
def subscribed(
    engine: DitEngine, context: RequestContext, clock: CommandClock, received: list[object]
) -> Iterator[None]:
    """The request in the registry of an instance, with a subscriber that receives its latent previews."""
    with tempfile.TemporaryDirectory() as folder:
        server, is_subscribed, ended = IpcServer(), threading.Event(), threading.Event()
        registry = TimedRegistry(server.publish, clock)

        def on_subscription(topic: bytes, begins: bool) -> None:
            (registry.watch if begins else registry.unwatch)(topic)
            is_subscribed.set()

        server.start(Path(folder), "glm_dit_0", {}, on_subscription)
        context.add_observer(registry)
        context.add_observer(LatentPreviewPublisher(registry, engine.intermediate_images.finish))
        context.start(Stage.CONDITION)

        def receive() -> None:
            with EventListener(Path(folder), context.id) as listener:
                while not ended.is_set():
                    received.extend(
                        event["latent_preview"] for event in listener.events(0.05) if "latent_preview" in event
                    )

        thread = threading.Thread(target=receive)
        thread.start()
        is_subscribed.wait()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            server.close()


def measure_latent_previews(engine: DitEngine, clock: CommandClock, request: PaintRequest, plain: float) -> None:
    """An image with a latent preview after every step but the last."""
    context, received = RequestContext(latent_preview_every=1), list[object]()
    clock.take()
    with subscribed(engine, context, clock, received):
        denoise = render(engine, request, context).denoise_seconds
    times = clock.take()
    step = statistics.median(seconds.whole for seconds in times[Step.__name__])
    previews, publishing = ([s.whole for s in times[name]] for name in (Estimate.__name__, PUBLISHING))
    preview, published = statistics.median(previews), statistics.median(publishing)
    report(
        "an estimate, on the engine's thread",
        preview_ms=preview * 1e3,
        publishing_ms=published * 1e3,
        worst_ms=1e3 * (max(previews) + max(publishing)),
        step_ms=step * 1e3,
        percent_of_step=100 * (preview + published) / step,
        previews=len(previews),
        received=len(received),
    )
    report(
        "an image with an estimate every step",
        denoise_seconds=denoise,
        without_seconds=plain,
        cost=denoise / plain - 1,
    )


def measure_preview(engine: DitEngine, clock: CommandClock, request: PaintRequest, image_seconds: float) -> None:
    """A preview image while nothing else is denoised; the first of its size is not timed."""
    engine.preview(RequestContext(), request, DEFAULT_LIMITS).result()
    clock.take()
    started = time.perf_counter()
    engine.preview(RequestContext(), request, DEFAULT_LIMITS).result()
    seconds, times = time.perf_counter() - started, clock.take()
    parts = {name: sum(s.whole for s in times[name]) for name in (Prepare.__name__, Step.__name__, Decode.__name__)}
    report(
        "a preview, alone",
        size=size_name(request.requested),
        steps=request.num_inference_steps,
        seconds=seconds,
        **{f"{name.lower()}_seconds": part for name, part in parts.items()},
        picture_seconds=image_seconds,
        percent_of_picture=100 * seconds / image_seconds,
    )


def measure_interleaved(engine: DitEngine, request: PaintRequest, preview: PaintRequest, plain: float) -> None:
    """An image with a preview denoised between its steps, as in a steady stream of requests."""
    results, done = list[Callable[[], object]](), list[float]()

    def submit_preview(progress: Progress) -> None:
        if not results and progress.stage is Stage.DENOISE:
            started, future = time.perf_counter(), engine.preview(RequestContext(), preview, DEFAULT_LIMITS)
            future.add_done_callback(lambda _: done.append(time.perf_counter() - started))
            results.append(future.result)

    denoise = render(engine, request, RequestContext(observers=(ProgressCallback(submit_preview),))).denoise_seconds
    results[0]()
    report(
        "an image with a preview between its steps",
        denoise_seconds=denoise,
        without_seconds=plain,
        cost=denoise / plain - 1,
        preview_answered_seconds=done[0],
    )


if __name__ == "__main__":
    sys.exit(main())

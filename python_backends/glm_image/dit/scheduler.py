"""Schedules images and previews on the DiT's device; works with commands only, without tensors."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from glm_image.dit.commands import (
    Decode,
    Drop,
    Estimate,
    ForgetSources,
    Prepare,
    ReserveSources,
    Step,
    source_commands,
)
from glm_image.dit.fair_queue import QUANTUM_SECONDS
from glm_image.dit.metrics import CACHED_STEPS, QUEUE_SECONDS, STEP_SECONDS, VAE_SECONDS
from glm_image.dit.previews import Previews
from glm_image.dit.step_times import StepTimes
from glm_image.dit.turns import Flow, Turns
from glm_image.errors import DeviceMemoryError
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.metadata import queued_seconds
from glm_image.parallel.commands import Command, R
from glm_image.request.parameters import PaintRequest
from glm_image.request.prompts import quoted_strings
from glm_image.request.source_images import SourcePicture
from glm_image.request.stages import Stage
from glm_image.telemetry.metrics import MetricSink, null_sink

CHANNELS: Final = 3
NO_WAIT_SECONDS: Final = 0.001
"""A shorter wait for a turn is not reported."""


class Run(Protocol):
    """Runs a command on all ranks and returns its result."""

    def __call__(self, command: Command[R], /) -> R: ...


class Scheduler:
    """Denoises images one at a time, those of different requests in turn.

    Each request has a thread that calls ``denoise``. Between steps its context is checked and waiting previews are
    rendered.
    """

    def __init__(self, run: Run, record: MetricSink = null_sink, quantum_seconds: float = QUANTUM_SECONDS) -> None:
        self._run = run
        self._record = record
        self._times = StepTimes()
        self._turns = Turns(quantum_seconds)
        self._numbers = itertools.count()
        self._device_is_free = threading.Lock()
        self.previews = Previews(self._render_preview, self._device_is_free, record)

    def denoise(
        self,
        context: RequestContext,
        request: PaintRequest,
        sources: tuple[SourcePicture, ...] = (),
        max_source_pixels: float = math.inf,
    ) -> list[int]:
        """Denoises all images of a valid request, whose sources are read once; returns their numbers for ``decode``.

        The sources of all requests that are denoised have at most ``max_source_pixels`` together; a request waits until
        its own fit.

        Raises what ``DitEngine.paint`` documents.
        """
        images: list[int] = []
        flow = Flow(
            images=len(request.seeds),
            predict=partial(self._times.image_seconds, request),
            source_pixels=sum(source.pixels.size // CHANNELS for source in sources),
            max_source_pixels=max_source_pixels,
        )
        try:
            context.check(self._min_seconds(request, 0))
            context.on_cancel(self._turns.wake)
            with self.previews.requests_first(), self._turns.taking_part(flow), self._forgetting(flow) as number:
                while flow.images:
                    with self._turn(context, request, flow):
                        if self._read_sources(context, flow, number, sources):
                            self._denoise_next(context, request, flow, number, images)
        except BaseException:
            self._drop(images)
            raise
        return images

    @contextmanager
    def _turn(self, context: RequestContext, request: PaintRequest, flow: Flow) -> Iterator[None]:
        """Waits for a turn, within the limits of the request; the wait is time in the queue."""
        has_begun = flow.images < len(request.seeds) or flow.needs_room

        def check() -> float:
            needed = self._min_seconds(request, (len(request.seeds) - flow.images) * request.num_inference_steps)
            context.check(needed)
            return context.seconds_to_spare(needed)

        with self._turns.turn(flow, check) as waited, self._device_is_free:
            if not has_begun:
                queued = max(waited, queued_seconds(request.ar_metadata, context.queue_began_ns))
                context.add_seconds(Stage.DIT_QUEUE, queued)
                self._record(QUEUE_SECONDS, queued)
                context.report(Stage.CONDITION, 0, 1)
            elif waited > NO_WAIT_SECONDS:
                context.add_seconds(Stage.DIT_QUEUE, waited)
            yield

    @contextmanager
    def _forgetting(self, flow: Flow) -> Iterator[int | None]:
        """Yields the number under which the request's sources are read, and drops them at the end; None without any."""
        if not flow.source_pixels:
            yield None
            return
        number = next(self._numbers)
        try:
            yield number
        finally:
            self._run(ForgetSources(number))

    def _read_sources(
        self, context: RequestContext, flow: Flow, number: int | None, sources: tuple[SourcePicture, ...]
    ) -> bool:
        """Reads the sources in the request's first turn; returns False if they must wait for the memory of others.

        The context is checked before each command.
        """
        if number is None or flow.has_read:
            return True
        with context.timed(Stage.CONDITION):
            context.check()
            if not self._run(ReserveSources(number, tuple(source.grid for source in sources))):
                flow.needs_room = True
                return False
            flow.has_read = True
            for command in source_commands(number, sources):
                context.check()
                self._run(command)
        return True

    def _denoise_next(
        self, context: RequestContext, request: PaintRequest, flow: Flow, sources_of: int | None, images: list[int]
    ) -> None:
        row = len(request.seeds) - flow.images
        images.append(next(self._numbers))
        context.check()
        with context.timed(Stage.CONDITION):
            sigmas = self._run(_prepare(request, row, images[-1], sources_of))
        with context.timed(Stage.DENOISE):
            self._take_steps(context, request, flow, images[-1], sigmas.tolist())
        flow.images -= 1

    def _take_steps(
        self, context: RequestContext, request: PaintRequest, flow: Flow, image: int, sigmas: list[float]
    ) -> None:
        steps, total, cached = request.num_inference_steps, len(request.seeds) * request.num_inference_steps, 0
        first, every = total - flow.images * steps, context.latent_preview_every
        try:
            for step in range(1, steps + 1):
                context.check(self._min_seconds(request, first + step - 1))
                is_shown = every > 0 and step % every == 0 and step < steps
                started = time.monotonic()
                cached += self._run(Step(image, is_shown))
                seconds = time.monotonic() - started
                self._times.add(request, seconds)
                self._record(STEP_SECONDS, seconds)
                context.report(Stage.DENOISE, first + step, total, sigmas[step], self._eta(request, flow, first + step))
                if is_shown:
                    self._show(context, image)
                self.previews.between_steps(seconds)
        finally:
            if cached:
                self._record(CACHED_STEPS, cached)
        context.cached_steps.append(cached)

    def _eta(self, request: PaintRequest, flow: Flow, taken: int) -> float:
        """Returns the expected seconds until all images of a request are denoised."""
        left = len(request.seeds) * request.num_inference_steps - taken
        return self._turns.seconds_to_end(flow, left * self._times.step_seconds(request))

    def _show(self, context: RequestContext, image: int) -> None:
        try:
            pixels = self._run(Estimate(image))
        except DeviceMemoryError as error:
            context.publish_skipped_latent_preview(error)
        else:
            context.publish_latent_preview(pixels)

    def _render_preview(self, context: RequestContext, request: PaintRequest) -> NDArray[np.uint8]:
        image = next(self._numbers)
        try:
            context.check()
            self._run(_prepare(request, 0, image, None))
            for _ in range(request.num_inference_steps):
                context.check()
                self._run(Step(image))
            return self._run(Decode(image))
        finally:
            self._run(Drop(image))

    def _min_seconds(self, request: PaintRequest, taken: int) -> float:
        """Returns the least that the remaining steps of a request took so far for requests of its kind."""
        left = len(request.seeds) * request.num_inference_steps - taken
        return left * self._times.fastest(request)

    def decode(self, context: RequestContext, images: list[int]) -> NDArray[np.uint8]:
        """Decodes denoised images to uint8 [images, height, width, 3]; they are dropped, also after an error."""
        try:
            with context.timed(Stage.VAE):
                return np.stack([self._decode_one(context, image) for image in images])
        finally:
            self._drop(images)

    def _decode_one(self, context: RequestContext, image: int) -> NDArray[np.uint8]:
        context.check()
        started = time.monotonic()
        pixels = self._run(Decode(image))
        self._record(VAE_SECONDS, time.monotonic() - started)
        return pixels

    def _drop(self, images: list[int]) -> None:
        for image in images:
            self._run(Drop(image))


def _prepare(request: PaintRequest, row: int, image: int, sources_of: int | None) -> Prepare:
    return Prepare(
        image=image,
        rendered_text=request.rendered_text,
        negative_text=tuple(quoted_strings(request.negative_prompt)),
        prior_token_ids=request.prior_token_ids[row],
        grid=request.grid,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        seed=request.seeds[row],
        sources_of=sources_of,
    )

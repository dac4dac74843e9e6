"""Schedules images and previews on the DiT's device; works with commands only, without tensors."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from glm_image.dit.commands import Decode, Drop, Estimate, ForgetSources, Prepare, ReadSources, Step
from glm_image.dit.metrics import CACHED_STEPS, STEP_SECONDS, VAE_SECONDS
from glm_image.dit.previews import Previews
from glm_image.errors import DeviceMemoryError
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.durations import DurationStatsByKey
from glm_image.parallel.commands import Command, R
from glm_image.request.parameters import PaintRequest
from glm_image.request.prompts import quoted_strings
from glm_image.request.source_images import SourcePicture
from glm_image.request.stages import Stage
from glm_image.telemetry.metrics import MetricSink, null_sink


class Run(Protocol):
    """Runs a command on all ranks and returns its result."""

    def __call__(self, command: Command[R], /) -> R: ...


class Scheduler:
    """Denoises one image at a time; between steps it checks the request's context and renders waiting previews."""

    def __init__(self, run: Run, record: MetricSink = null_sink) -> None:
        self._run = run
        self._record = record
        self._step_seconds = DurationStatsByKey()
        self._numbers = itertools.count()
        self._device_is_free = threading.Lock()
        self.previews = Previews(self._render_preview, self._device_is_free, record)

    def denoise(
        self, context: RequestContext, request: PaintRequest, sources: tuple[SourcePicture, ...] = ()
    ) -> list[int]:
        """Denoises all images of a valid request, whose sources are read once; returns their numbers for ``decode``.

        Raises what ``DitEngine.paint`` documents.
        """
        images: list[int] = []
        try:
            context.check(self._min_seconds(request, 0))
            with self.previews.requests_first(), self._device_is_free, self._reading(context, sources) as sources_of:
                for row in range(len(request.seeds)):
                    images.append(next(self._numbers))
                    self._denoise_one(context, request, row, images[-1], sources_of)
        except BaseException:
            self._drop(images)
            raise
        return images

    @contextmanager
    def _reading(self, context: RequestContext, sources: tuple[SourcePicture, ...]) -> Iterator[int | None]:
        if not sources:
            yield None
            return
        context.check()
        number = next(self._numbers)
        try:
            with context.timed(Stage.CONDITION):
                self._run(ReadSources(number, sources))
            yield number
        finally:
            self._run(ForgetSources(number))

    def _denoise_one(
        self, context: RequestContext, request: PaintRequest, row: int, image: int, sources_of: int | None
    ) -> None:
        context.check()
        with context.timed(Stage.CONDITION):
            sigmas = self._run(_prepare(request, row, image, sources_of))
        with context.timed(Stage.DENOISE):
            self._take_steps(context, request, row, image, sigmas.tolist())

    def _take_steps(
        self, context: RequestContext, request: PaintRequest, row: int, image: int, sigmas: list[float]
    ) -> None:
        steps, stats, cached = request.num_inference_steps, self._step_seconds.of(_key(request)), 0
        every = context.latent_preview_every
        try:
            for taken in range(row * steps, (row + 1) * steps):
                context.check(self._min_seconds(request, taken))
                step = taken - row * steps + 1
                is_shown = every > 0 and step % every == 0 and step < steps
                started = time.monotonic()
                cached += self._run(Step(image, is_shown))
                seconds = time.monotonic() - started
                stats.add(seconds)
                self._record(STEP_SECONDS, seconds)
                context.report(Stage.DENOISE, taken + 1, len(request.seeds) * steps, sigmas[step])
                if is_shown:
                    self._show(context, image)
                self.previews.between_steps(seconds)
        finally:
            if cached:
                self._record(CACHED_STEPS, cached)
        context.cached_steps.append(cached)

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
        return left * self._step_seconds.of(_key(request)).fastest

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


def _key(request: PaintRequest) -> tuple[object, ...]:
    """Returns what the seconds of a step depend on."""
    return request.grid, request.guidance_scale > 1, request.source_grids

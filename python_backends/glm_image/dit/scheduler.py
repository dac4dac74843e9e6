"""The host's side of the second stage: which picture is painted next. Touches no tensors."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from glm_image.dit.commands import Command, Decode, Drop, Estimate, ForgetSources, Prepare, ReadSources, Result, Step
from glm_image.dit.metrics import CACHED_STEPS, STEP_SECONDS, VAE_SECONDS
from glm_image.dit.previews import Previews
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.eta import DurationStatsByKey
from glm_image.request.parameters import PaintRequest
from glm_image.request.source_images import SourcePicture
from glm_image.request.stages import Stage
from glm_image.telemetry.metrics import MetricSink, null_sink

Run = Callable[[Command], Result]


class Scheduler:
    """Denoises one picture at a time, looking at its job and at the previews that wait between steps.

    Args:
        run: the executor, or what sends commands to all of its ranks.
        record: takes what ``dit.measures`` names.

    Attributes:
        previews: those that wait.
    """

    def __init__(self, run: Run, record: MetricSink = null_sink) -> None:
        self._run = run
        self._record = record
        self._paces = DurationStatsByKey()
        self._names = itertools.count()
        self._device_is_free = threading.Lock()
        self.previews = Previews(self._paint_preview, self._device_is_free, record)

    def denoise(
        self, context: RequestContext, request: PaintRequest, sources: tuple[SourcePicture, ...] = ()
    ) -> list[int]:
        """Denoises all pictures of a request; returns their names for ``decode``.

        Args:
            context: looked at between steps.
            request: what to paint.
            sources: its source images, read once for all its pictures.

        Raises:
            CancelledError: the job was cancelled.
            DeadlineExceededError: its time ran out, or is too short.
            InvalidInputError: the sources need more memory than the device has.
        """
        pictures: list[int] = []
        try:
            context.check(self._needed_seconds(request, 0))
            with self.previews.painting(), self._device_is_free, self._read(context, sources) as sources_of:
                for row in range(len(request.seeds)):
                    pictures.append(next(self._names))
                    self._denoise_one(context, request, row, pictures[-1], sources_of)
        except BaseException:
            self.drop(pictures)
            raise
        return pictures

    @contextmanager
    def _read(self, context: RequestContext, sources: tuple[SourcePicture, ...]) -> Iterator[int | None]:
        if not sources:
            yield None
            return
        context.check()
        name = next(self._names)
        try:
            with context.timed(Stage.CONDITION):
                self._run(ReadSources(name, sources))
            yield name
        finally:
            self._run(ForgetSources(name))

    def _denoise_one(
        self, context: RequestContext, request: PaintRequest, row: int, picture: int, sources_of: int | None
    ) -> None:
        context.check()
        with context.timed(Stage.CONDITION):
            sigmas = self._run(_preparation(request, row, picture, sources_of))
        with context.timed(Stage.DENOISE):
            assert isinstance(sigmas, np.ndarray)
            self._take_steps(context, request, row, picture, sigmas.tolist())

    def _take_steps(
        self, context: RequestContext, request: PaintRequest, row: int, picture: int, sigmas: list[float]
    ) -> None:
        steps, pace, cached = request.num_inference_steps, self._paces.of(_kind(request)), 0
        try:
            for taken in range(row * steps, (row + 1) * steps):
                context.check(self._needed_seconds(request, taken))
                step = taken - row * steps + 1
                is_shown = context.estimate_every > 0 and step % context.estimate_every == 0 and step < steps
                started = time.monotonic()
                cached += self._run(Step(picture, is_shown)) is True
                seconds = time.monotonic() - started
                pace.add(seconds)
                self._record(STEP_SECONDS, seconds)
                context.report(Stage.DENOISE, taken + 1, len(request.seeds) * steps, sigmas[step])
                if is_shown:
                    self._show(context, picture)
                self.previews.between_steps(seconds)
        finally:
            if cached:
                self._record(CACHED_STEPS, cached)
        context.cached_steps.append(cached)

    def _show(self, context: RequestContext, picture: int) -> None:
        pixels = self._run(Estimate(picture))
        assert isinstance(pixels, np.ndarray)
        context.publish_estimate(pixels)

    def _paint_preview(self, context: RequestContext, request: PaintRequest) -> NDArray[np.uint8]:
        picture = next(self._names)
        try:
            context.check()
            self._run(_preparation(request, 0, picture, None))
            for _ in range(request.num_inference_steps):
                context.check()
                self._run(Step(picture))
            pixels = self._run(Decode(picture))
        finally:
            self._run(Drop(picture))
        assert isinstance(pixels, np.ndarray)
        return pixels

    def _needed_seconds(self, request: PaintRequest, taken: int) -> float:
        """The least that a request's denoising still takes."""
        left = len(request.seeds) * request.num_inference_steps - taken
        return left * self._paces.of(_kind(request)).fastest

    def decode(self, context: RequestContext, pictures: list[int]) -> NDArray[np.uint8]:
        """Makes pixels of denoised pictures: uint8 [pictures, height, width, 3].

        Raises:
            CancelledError: the job was cancelled; the pictures are forgotten.
            DeadlineExceededError: its time ran out; as above.
        """
        try:
            with context.timed(Stage.VAE):
                decoded = [self._decode_one(context, picture) for picture in pictures]
        finally:
            self.drop(pictures)
        return np.stack([pixels for pixels in decoded if isinstance(pixels, np.ndarray)])

    def _decode_one(self, context: RequestContext, picture: int) -> Result:
        context.check()
        started = time.monotonic()
        pixels = self._run(Decode(picture))
        self._record(VAE_SECONDS, time.monotonic() - started)
        return pixels

    def drop(self, pictures: list[int]) -> None:
        """Forgets pictures, those already forgotten included."""
        for picture in pictures:
            self._run(Drop(picture))


def _preparation(request: PaintRequest, row: int, picture: int, sources_of: int | None) -> Prepare:
    return Prepare(
        picture=picture,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        prior_token_ids=request.prior_token_ids[row],
        grid=request.grid,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        seed=request.seeds[row],
        sources_of=sources_of,
    )


def _kind(request: PaintRequest) -> tuple[object, ...]:
    """What the time of a step depends on."""
    return request.grid, request.guidance_scale > 1, request.source_grids

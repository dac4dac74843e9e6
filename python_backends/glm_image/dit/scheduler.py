"""The host's side of the second stage: which picture is painted next. Touches no tensors."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from glm_image.dit.executor import Command, Decode, Drop, Estimate, ForgetSources, Prepare, ReadSources, Result, Step
from glm_image.dit.measures import CACHED_STEPS, STEP_SECONDS, VAE_SECONDS
from glm_image.dit.previews import Previews
from glm_image.job import Job
from glm_image.measures import Record, keep_nothing
from glm_image.pace import Paces
from glm_image.request import PaintRequest
from glm_image.sources import SourcePicture

Run = Callable[[Command], Result]


class Scheduler:
    """Denoises one picture at a time, looking at its job and at the previews that wait between steps.

    Args:
        run: the executor, or what sends commands to all of its ranks.
        record: takes what ``dit.measures`` names.

    Attributes:
        previews: those that wait.
    """

    def __init__(self, run: Run, record: Record = keep_nothing) -> None:
        self._run = run
        self._record = record
        self._paces = Paces()
        self._names = itertools.count()
        self._device_is_free = threading.Lock()
        self.previews = Previews(self._paint_preview, self._device_is_free, record)

    def denoise(self, job: Job, request: PaintRequest, sources: tuple[SourcePicture, ...] = ()) -> list[int]:
        """Denoises all pictures of a request; returns their names for ``decode``.

        Args:
            job: looked at between steps.
            request: what to paint.
            sources: its source images, read once for all its pictures.

        Raises:
            CancelledError: the job was cancelled.
            DeadlineExceededError: its time ran out, or is too short.
            InvalidInputError: the sources need more memory than the device has.
        """
        pictures: list[int] = []
        try:
            job.check(self._needed_seconds(request, 0))
            with self.previews.painting(), self._device_is_free, self._read(job, sources) as sources_of:
                for row in range(len(request.seeds)):
                    pictures.append(next(self._names))
                    self._denoise_one(job, request, row, pictures[-1], sources_of)
        except BaseException:
            self.drop(pictures)
            raise
        return pictures

    @contextmanager
    def _read(self, job: Job, sources: tuple[SourcePicture, ...]) -> Iterator[int | None]:
        if not sources:
            yield None
            return
        job.check()
        name = next(self._names)
        try:
            with job.timed("condition"):
                self._run(ReadSources(name, sources))
            yield name
        finally:
            self._run(ForgetSources(name))

    def _denoise_one(self, job: Job, request: PaintRequest, row: int, picture: int, sources_of: int | None) -> None:
        job.check()
        with job.timed("condition"):
            sigmas = self._run(_preparation(request, row, picture, sources_of))
        with job.timed("denoise"):
            assert isinstance(sigmas, np.ndarray)
            self._take_steps(job, request, row, picture, sigmas.tolist())

    def _take_steps(self, job: Job, request: PaintRequest, row: int, picture: int, sigmas: list[float]) -> None:
        steps, pace, cached = request.num_inference_steps, self._paces.of(_kind(request)), 0
        try:
            for taken in range(row * steps, (row + 1) * steps):
                job.check(self._needed_seconds(request, taken))
                step = taken - row * steps + 1
                is_shown = job.pictures_every > 0 and step % job.pictures_every == 0 and step < steps
                started = time.monotonic()
                cached += self._run(Step(picture, is_shown)) is True
                seconds = time.monotonic() - started
                pace.add(seconds)
                self._record(STEP_SECONDS, seconds)
                job.report("denoise", taken + 1, len(request.seeds) * steps, sigmas[step])
                if is_shown:
                    self._show(job, picture)
                self.previews.between_steps(seconds)
        finally:
            if cached:
                self._record(CACHED_STEPS, cached)
        job.cached_steps.append(cached)

    def _show(self, job: Job, picture: int) -> None:
        pixels = self._run(Estimate(picture))
        assert isinstance(pixels, np.ndarray)
        job.show(pixels)

    def _paint_preview(self, job: Job, request: PaintRequest) -> NDArray[np.uint8]:
        picture = next(self._names)
        try:
            job.check()
            self._run(_preparation(request, 0, picture, None))
            for _ in range(request.num_inference_steps):
                job.check()
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

    def decode(self, job: Job, pictures: list[int]) -> NDArray[np.uint8]:
        """Makes pixels of denoised pictures: uint8 [pictures, height, width, 3].

        Raises:
            CancelledError: the job was cancelled; the pictures are forgotten.
            DeadlineExceededError: its time ran out; as above.
        """
        try:
            with job.timed("vae"):
                decoded = [self._decode_one(job, picture) for picture in pictures]
        finally:
            self.drop(pictures)
        return np.stack([pixels for pixels in decoded if isinstance(pixels, np.ndarray)])

    def _decode_one(self, job: Job, picture: int) -> Result:
        job.check()
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

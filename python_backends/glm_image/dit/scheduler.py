"""The host's side of the second stage: which picture is painted next. Touches no tensors."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from glm_image.dit.executor import Command, Decode, Drop, Prepare, Step
from glm_image.job import Job
from glm_image.request import PaintRequest

Run = Callable[[Command], "NDArray[np.uint8] | None"]


class Scheduler:
    """Denoises one picture at a time, looking at its job between steps.

    Args:
        run: the executor, or what sends commands to all of its ranks.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._names = itertools.count()
        self._device_is_free = threading.Lock()

    def denoise(self, job: Job, request: PaintRequest) -> list[int]:
        """Denoises all pictures of a request; returns their names for ``decode``.

        Raises:
            CancelledError: the job was cancelled.
            DeadlineExceededError: its time ran out.
        """
        pictures: list[int] = []
        try:
            with self._device_is_free:
                for row in range(len(request.seeds)):
                    pictures.append(next(self._names))
                    self._denoise_one(job, request, row, pictures[-1])
        except BaseException:
            self.drop(pictures)
            raise
        return pictures

    def _denoise_one(self, job: Job, request: PaintRequest, row: int, picture: int) -> None:
        job.check()
        with job.timed("condition"):
            self._run(
                Prepare(
                    picture=picture,
                    prompt=request.prompt,
                    negative_prompt=request.negative_prompt,
                    prior_token_ids=request.prior_token_ids[row],
                    grid=request.grid,
                    num_inference_steps=request.num_inference_steps,
                    guidance_scale=request.guidance_scale,
                    seed=request.seeds[row],
                )
            )
        steps = request.num_inference_steps
        with job.timed("denoise"):
            for step in range(steps):
                job.check()
                self._run(Step(picture))
                job.report("denoise", row * steps + step + 1, len(request.seeds) * steps)

    def decode(self, job: Job, pictures: list[int]) -> NDArray[np.uint8]:
        """Makes pixels of denoised pictures: uint8 [pictures, height, width, 3]."""
        try:
            with job.timed("vae"):
                decoded = [self._run(Decode(picture)) for picture in pictures]
        finally:
            self.drop(pictures)
        return np.stack([pixels for pixels in decoded if pixels is not None])

    def drop(self, pictures: list[int]) -> None:
        """Forgets pictures, those already forgotten included."""
        for picture in pictures:
            self._run(Drop(picture))

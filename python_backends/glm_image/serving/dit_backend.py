"""``glm_dit``: blocks while a picture is denoised, so that Triton queues for it; the rest goes on in a thread."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_image.dit.measures import DIT_MEASURES
from glm_image.errors import InvalidInputError
from glm_image.geometry import PIXELS_PER_TOKEN, Grid, Size
from glm_image.job import Job
from glm_image.metadata import queued_seconds, read_ar_metadata, request_metadata
from glm_image.request import PaintRequest, consecutive_seeds, random_seed
from glm_image.serving import strings
from glm_image.serving.answer import Answer
from glm_image.serving.cache_parameters import cache_settings
from glm_image.serving.declaration import DIT_PARAMETERS
from glm_image.serving.instance import Instance
from glm_image.serving.metrics import Metrics
from glm_image.serving.tensors import Inputs, text_array

logger = logging.getLogger(__name__)

UNFINISHED_REQUESTS = 2
"""Requests that may wait for the VAE and the encoder, their latents in the device's memory."""


class DitBackend:
    """The Triton Python model of the second stage."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the engine on this instance's device."""
        strings.install()
        instance = Instance.read(args, DIT_PARAMETERS)
        place = instance.take_place(spare_first=True)
        # The engine imports torch and diffusers, which must not happen before the instance's device is chosen.
        from glm_image.checkpoint import Checkpoint  # noqa: PLC0415
        from glm_image.devices import named_dtype, open_device  # noqa: PLC0415
        from glm_image.dit.engine import DitEngine  # noqa: PLC0415
        from glm_image.dit.settings import DitSettings  # noqa: PLC0415

        parameters, cache = instance.parameters, cache_settings(instance)
        self._limits = instance.limits
        self._checkpoint = Checkpoint.open(instance.checkpoint, parameters["load_format"])
        device = open_device(place.inside[0], known_as=place.devices[0])
        logger.info("loading the transformer on %s", device)
        self._metrics = Metrics(DIT_MEASURES, instance)
        self._engine = DitEngine(
            self._checkpoint,
            device,
            DitSettings(
                dtype=named_dtype(parameters["dtype"]),
                memory_utilization=instance.share("memory_utilization"),
                warmup_sizes=instance.sizes("warmup_sizes", device.warmup_sizes),
                cache=cache,
                quantization=parameters["quantization"],
                vae_tiling=parameters["vae_tiling"],
                largest_side=self._limits.max_side,
            ),
            self._metrics.record,
        )
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dit-finisher")
        self._may_wait = threading.Semaphore(UNFINISHED_REQUESTS)

    def execute(self, requests: list[Any]) -> None:
        """Denoises requests one after the other; each is answered when its pictures are decoded and encoded."""
        for request in requests:
            answer = Answer(request)
            try:
                self._paint(request, answer)
            except Exception as error:  # whatever it is, the client must get an answer
                answer.fail(error)

    def finalize(self) -> None:
        """Finishes what is denoised."""
        self._finisher.shutdown(wait=True)
        self._metrics.close()

    def _paint(self, request: Any, answer: Answer) -> None:
        inputs = Inputs(request)
        paint = read_request(inputs)
        # As a step of the ensemble it is told the whole request's timeout again; the first stage knows what is left.
        job = Job.with_timeout(request.request_id(), request.timeout())
        deadline_ns = inputs.integer("deadline_ns") or 0
        if deadline_ns < 0:
            raise InvalidInputError.of("deadline_ns", deadline_ns, "0 (none) and above")
        job.deadline_ns = deadline_ns or job.deadline_ns
        job.add_seconds("dit_queue", queued_seconds(paint.ar_metadata))
        paint.check(self._limits, self._engine.codebook_size)
        sources = paint.read_sources(self._limits, self._engine.source_rule)
        pictures = self._engine.denoise(job, paint, sources)
        self._may_wait.acquire()
        self._finisher.submit(self._finish, answer, job, paint, pictures)

    def _finish(self, answer: Answer, job: Job, paint: PaintRequest, pictures: list[int]) -> None:
        try:
            result = self._engine.finish(job, paint, pictures)
            raw = paint.output_format == "raw"
            answer.send(
                {
                    "images": result.pixels if raw else np.zeros((0, 0, 0, 3)),
                    "images_base64": text_array(*(base64.b64encode(file).decode() for file in result.encoded)),
                    "metadata": text_array(json.dumps(request_metadata(self._checkpoint, job, paint))),
                }
            )
        except Exception as error:  # whatever it is, the client must get an answer
            answer.fail(error)
        finally:
            self._may_wait.release()


def read_request(inputs: Inputs) -> PaintRequest:
    """Reads what the first stage, or a client with tokens of its own, asks for; not yet validated."""
    tokens, sides = _required(inputs, "prior_token_ids"), _required(inputs, "prior_grid")
    grid = Grid(*map(int, sides))
    size = inputs.array("resolved_size")
    seed = inputs.integer("resolved_seed")
    return PaintRequest(
        prompt=inputs.text("prompt") or "",
        prior_token_ids=tokens,
        grid=grid,
        requested=Size(*(side * PIXELS_PER_TOKEN for side in grid) if size is None else map(int, size)),
        # Of more rows than that, ``check`` refuses the number.
        seeds=consecutive_seeds(random_seed() if seed is None else seed, min(len(tokens), strings.MAX_STRINGS)),
        ar_metadata=read_ar_metadata(inputs.text("ar_metadata") or ""),
        source_grids=_source_grids(inputs),
        **inputs.given(
            images=inputs.files("image"),
            source_token_ids=inputs.array("source_token_ids"),
            negative_prompt=inputs.text("negative_prompt"),
            num_inference_steps=inputs.integer("num_inference_steps"),
            guidance_scale=inputs.real("guidance_scale"),
            output_format=inputs.text("output_format"),
        ),
    )


def _source_grids(inputs: Inputs) -> tuple[Grid, ...]:
    array = inputs.array("source_grids")
    if array is None:
        return ()
    if len(array) > strings.MAX_STRINGS:  # before a loop over millions
        raise InvalidInputError.of("source_grids' number of rows", len(array), "one for each image")
    return tuple(Grid(*map(int, pair)) for pair in array)


def _required(inputs: Inputs, name: str) -> NDArray[Any]:
    # Triton refuses too few inputs, and does not look which they are.
    array = inputs.array(name)
    if array is None:
        raise InvalidInputError(f"{name} is missing; allowed: the tensor that glm_ar gives")
    return array

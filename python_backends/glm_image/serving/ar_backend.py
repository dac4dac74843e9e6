"""``glm_ar``: hands requests to the engine and answers them when their tokens are there."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from glm_image.ar.measures import AR_MEASURES
from glm_image.errors import UnavailableError
from glm_image.job import Job
from glm_image.metadata import ar_metadata
from glm_image.request import GenerationParameters, ResolvedRequest
from glm_image.serving import strings
from glm_image.serving.answer import Answer
from glm_image.serving.declaration import AR_PARAMETERS
from glm_image.serving.instance import Instance
from glm_image.serving.metrics import Metrics
from glm_image.serving.tensors import Inputs, text_array

if TYPE_CHECKING:
    from glm_image.ar.engine import ArResult

logger = logging.getLogger(__name__)

DECODING_THREADS = 2
"""Requests whose source images are decoded at once."""


class ArBackend:
    """The Triton Python model of the first stage."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the engine on this instance's device."""
        strings.install()
        instance = Instance.read(args, AR_PARAMETERS)
        self._limits = instance.limits
        self._metrics = Metrics(AR_MEASURES, instance)
        self._engine = _load(instance, self._metrics)
        self._decoder = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="ar-decoder")
        self._max_decoding = instance.integer("max_queue", 1)
        self._may_decode = threading.Semaphore(self._max_decoding)

    def execute(self, requests: list[Any]) -> None:
        """Hands requests over; the answers go out later, from the engine's thread.

        Source images are decoded in threads, so that requests without them do not wait.
        """
        for request in requests:
            answer = Answer(request)
            try:
                self._accept(request, answer)
            except Exception as error:  # whatever it is, the client must get an answer
                answer.fail(error)

    def finalize(self) -> None:
        """Ends what runs, with an answer to each."""
        self._decoder.shutdown(wait=True)
        self._engine.close()
        self._metrics.close()

    def _accept(self, request: Any, answer: Answer) -> None:
        job = Job.with_timeout(request.request_id(), request.timeout())
        asked = read_request(request)
        if asked.images is None:
            self._submit(asked, job, answer)
        elif self._may_decode.acquire(blocking=False):
            self._decoder.submit(self._decode, asked, job, answer)
        else:
            raise UnavailableError(
                f"glm_ar decodes the source images of {self._max_decoding} requests, as many as max_queue allows; "
                "try again later"
            )

    def _decode(self, asked: GenerationParameters, job: Job, answer: Answer) -> None:
        try:
            job.check()
            self._submit(asked, job, answer)
        except Exception as error:  # whatever it is, the client must get an answer
            answer.fail(error)
        finally:
            self._may_decode.release()

    def _submit(self, asked: GenerationParameters, job: Job, answer: Answer) -> None:
        resolved = asked.resolve(self._limits, self._engine.sampling, self._engine.source_rule)
        self._engine.submit(job, resolved).add_done_callback(lambda done: _reply(answer, job, resolved, done))


def _load(instance: Instance, metrics: Metrics) -> Any:
    place = instance.take_place(spare_first=False)
    # The engine imports torch and transformers, which must not happen before the instance's device is chosen.
    from glm_image.ar.engine import ArEngine  # noqa: PLC0415
    from glm_image.ar.settings import ArSettings  # noqa: PLC0415
    from glm_image.checkpoint import Checkpoint  # noqa: PLC0415
    from glm_image.devices import named_dtype, open_device  # noqa: PLC0415

    parameters = instance.parameters
    device = open_device(place.inside[0], known_as=place.devices[0])
    settings = ArSettings(
        dtype=named_dtype(parameters["dtype"]),
        max_num_seqs=instance.integer("max_num_seqs", 1),
        max_sequence_tokens=instance.integer("max_sequence_tokens", 1),
        max_queue=instance.integer("max_queue", 1),
        graph_mode=parameters["graph_mode"],
        graph_capture_sizes=instance.integers("graph_capture_sizes"),
        memory_utilization=instance.share("memory_utilization"),
        int8=parameters["quantization"] == "int8",
    )
    logger.info("loading the decoder on %s", device)
    checkpoint = Checkpoint.open(instance.checkpoint, parameters["load_format"])
    return ArEngine(checkpoint, device, settings, metrics.record)


def read_request(request: Any) -> GenerationParameters:
    """Reads what a client asks for, not yet validated."""
    inputs = Inputs(request)
    return GenerationParameters(
        prompt=inputs.text("prompt") or "",
        images=inputs.files("image"),
        **inputs.given(
            height=inputs.integer("height"),
            width=inputs.integer("width"),
            num_inference_steps=inputs.integer("num_inference_steps"),
            guidance_scale=inputs.real("guidance_scale"),
            seed=inputs.integer("seed"),
            num_images=inputs.integer("num_images"),
            negative_prompt=inputs.text("negative_prompt"),
            temperature=inputs.real("temperature"),
            top_p=inputs.real("top_p"),
            top_k=inputs.integer("top_k"),
            output_format=inputs.text("output_format"),
        ),
    )


def _reply(answer: Answer, job: Job, resolved: ResolvedRequest, done: Future[ArResult]) -> None:
    error = done.exception()
    if error is not None:
        answer.fail(error)
        return
    result = done.result()
    answer.send(
        {
            "prior_token_ids": result.prior_token_ids,
            "prior_grid": np.array(resolved.target),
            "source_token_ids": result.source_token_ids,
            "source_grids": np.array(result.source_grids).reshape(-1, 2),
            "resolved_seed": np.array([resolved.seeds[0]]),
            "resolved_size": np.array(resolved.requested),
            "deadline_ns": np.array([job.deadline_ns]),
            "ar_metadata": text_array(json.dumps(ar_metadata(job, result.tokens))),
        }
    )

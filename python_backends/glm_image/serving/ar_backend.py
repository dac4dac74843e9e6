"""``glm_ar``: hands requests to the engine and answers them when their tokens are there."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.ar.measures import AR_ENDS, AR_MEASURES
from glm_image.errors import QueueFullError
from glm_image.following import Following
from glm_image.geometry import Grid, preview_of
from glm_image.inflight import InFlight
from glm_image.job import Job
from glm_image.metadata import ar_metadata
from glm_image.request import GenerationParameters, ResolvedRequest
from glm_image.serving import strings
from glm_image.serving.answer import Answer
from glm_image.serving.declaration import AR_PARAMETERS
from glm_image.serving.entrances import ENTRANCES, STAGES
from glm_image.serving.gathering import Gathering
from glm_image.serving.instance import Instance
from glm_image.serving.metrics import Metrics
from glm_image.serving.open_answers import OpenAnswers
from glm_image.serving.process_end import end_process
from glm_image.serving.pulse import Pulse
from glm_image.serving.reception import Reception
from glm_image.serving.request_log import Entry, RequestLog
from glm_image.serving.spans import Spans
from glm_image.serving.tensors import Inputs, text_array

if TYPE_CHECKING:
    from glm_image.ar.engine import ArResult

logger = logging.getLogger(__name__)

DECODING_THREADS = 2
"""Requests whose source images are decoded at once."""


@dataclass(frozen=True)
class _Taken:
    """A request that was let in."""

    asked: GenerationParameters
    job: Job
    answer: Answer
    entry: Entry
    following: Following


class ArBackend:
    """The Triton Python model of the first stage."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the engine on this instance's device."""
        strings.install()
        instance = Instance.read(args, AR_PARAMETERS)
        self._limits, self._timeouts = instance.limits, instance.timeouts
        log = RequestLog(instance, is_last=False)
        self._spans = Spans(instance)
        self._metrics = Metrics(AR_MEASURES, instance)
        self._open = OpenAnswers()
        self._gathering = Gathering.of(instance)
        self._engine, self._pulse = _load(instance, self._metrics, self._open, self._gathering)
        self._reception = Reception(instance, InFlight("ar_queue", "handed_on"), AR_ENDS, self._metrics.record, log)
        self._decoder = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="ar-decoder")
        self._max_decoding = instance.integer("max_queue", 1)
        self._may_decode = threading.Semaphore(self._max_decoding)
        orders = {"drain": partial(_unload, ENTRANCES), "unload": partial(_unload, STAGES)}
        self._pulse.start(self._engine.is_alive, orders if instance.index == 0 else {})

    def execute(self, requests: list[Any]) -> None:
        """Hands requests over; the answers go out later, from the engine's thread.

        Source images are decoded in threads, so that requests without them do not wait.
        """
        for request in requests:
            answer = self._open.add(Answer(request))
            entry = self._reception.expect(request, answer)
            try:
                self._accept(request, answer, entry)
            except Exception as error:  # whatever it is, the client must get an answer
                answer.fail(error)

    def finalize(self) -> None:
        """Ends what runs, with an answer to each."""
        self._pulse.close()
        self._decoder.shutdown(wait=True)
        self._engine.close()
        if self._gathering is not None:
            self._gathering.close()
        self._reception.close()
        self._metrics.close()
        self._spans.close()
        end_process()

    def _accept(self, request: Any, answer: Answer, entry: Entry) -> None:
        job = Job.with_timeout(request.request_id(), self._timeouts.of(request.timeout()))
        following = Following.read(request.parameters())
        job.arrived_ns = job.arrived_ns if following.arrived_ns is None else following.arrived_ns
        entry.follow(job)
        self._spans.follow(request, job)
        self._reception.begin(job, answer)
        asked = read_request(request)
        entry.note(asked.prompt, **_told(asked))
        taken = _Taken(asked, job, answer, entry, following)
        if asked.images is None:
            self._submit(taken)
        elif self._may_decode.acquire(blocking=False):
            self._decoder.submit(self._decode, taken)
        else:
            raise QueueFullError(
                f"glm_ar decodes the source images of {self._max_decoding} requests, as many as max_queue allows; "
                "try again later"
            )

    def _decode(self, taken: _Taken) -> None:
        try:
            taken.job.check()
            self._submit(taken)
        except Exception as error:  # whatever it is, the client must get an answer
            taken.answer.fail(error)
        finally:
            self._may_decode.release()

    def _submit(self, taken: _Taken) -> None:
        job = taken.job
        resolved = taken.asked.resolve(self._limits, self._engine.sampling, self._engine.source_rule)
        size = resolved.requested
        taken.entry.note(taken.asked.prompt, width=size.width, height=size.height, seed=resolved.seeds[0])
        if taken.following.previews and (grid := preview_of(resolved.grids)) is not None:
            job.on_preview = partial(self._hand_out_preview, job, grid, resolved.seeds[0])
        if self._gathering is not None:
            self._gathering.expect(job, len(resolved.seeds), taken.answer)
        self._engine.submit(job, resolved).add_done_callback(lambda done: _reply(taken.answer, job, resolved, done))

    def _hand_out_preview(self, job: Job, grid: Grid, seed: int, tokens: NDArray[np.int32]) -> None:
        self._reception.tell(job, lambda: {"preview": {"grid": list(grid), "tokens": tokens.tolist(), "seed": seed}})


def _told(asked: GenerationParameters) -> dict[str, Any]:
    """What the log tells of a request, as it was asked for."""
    return {
        "width": asked.width,
        "height": asked.height,
        "images": asked.num_images,
        "steps": asked.num_inference_steps,
        "seed": asked.seed,
        "sources": len(asked.images or ()),
        "output_format": asked.output_format,
    }


def _unload(models: Sequence[str]) -> None:
    """Takes models away; requests in flight go on, and Triton ends a model's process after its last one."""
    for model in models:
        with contextlib.suppress(pb_utils.TritonModelException):  # this server was started without it
            pb_utils.unload_model(model)


def _load(
    instance: Instance, metrics: Metrics, open_answers: OpenAnswers, gathering: Gathering | None
) -> tuple[Any, Pulse]:
    place = instance.take_place(spare_first=False)
    # Read before seconds of imports, so that what is not allowed is told at once.
    folder, names = instance.checkpoint, ("max_num_seqs", "max_sequence_tokens", "max_queue")
    slots, positions, longest_queue = (instance.integer(name, 1) for name in names)
    # The engine imports torch and transformers, which must not happen before the instance's device is chosen.
    from glm_image.ar.engine import ArEngine  # noqa: PLC0415
    from glm_image.ar.settings import ArSettings  # noqa: PLC0415
    from glm_image.checkpoint import Checkpoint  # noqa: PLC0415
    from glm_image.devices import named_dtype, open_device  # noqa: PLC0415

    parameters = instance.parameters
    device = open_device(place.inside[0], known_as=place.devices[0])
    settings = ArSettings(
        dtype=named_dtype(parameters["dtype"]),
        max_num_seqs=slots,
        max_sequence_tokens=positions,
        max_queue=longest_queue,
        graph_mode=parameters["graph_mode"],
        graph_capture_sizes=instance.integers("graph_capture_sizes"),
        memory_utilization=instance.share("memory_utilization"),
        int8=parameters["quantization"] == "int8",
    )
    logger.info("loading the decoder on %s", device)
    checkpoint = Checkpoint.open(folder, parameters["load_format"])
    pulse = Pulse(instance.name, instance.seconds("hang_seconds", device.hang_seconds))
    engine = ArEngine(
        checkpoint,
        device,
        settings,
        metrics.record,
        watched=pulse.watched,
        admission=None if gathering is None else gathering.admission,
        peers=instance.peers(place, device, open_answers.end_process),
    )
    return engine, pulse


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

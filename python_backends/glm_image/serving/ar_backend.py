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

from glm_image.ar.metrics import AR_METRICS, AR_OUTCOMES
from glm_image.config.instance import Instance
from glm_image.config.models import ENTRY_MODELS, STAGES
from glm_image.config.parameters import ArParameters
from glm_image.errors import QueueFullError
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.metadata import ar_metadata
from glm_image.lifecycle.registry import RequestRegistry
from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.request.geometry import Grid, preview_of
from glm_image.request.parameters import GenerationParameters, ResolvedRequest
from glm_image.serving import bytes_tensors
from glm_image.serving.admission_feed import AdmissionFeed
from glm_image.serving.exit import end_process
from glm_image.serving.metrics_export import MetricsExporter
from glm_image.serving.pending_responses import PendingResponses
from glm_image.serving.request_gate import RequestGate
from glm_image.serving.request_reader import read_fields
from glm_image.serving.responder import Responder
from glm_image.serving.tensors import Inputs, text_array
from glm_image.telemetry.heartbeat import Heartbeat
from glm_image.telemetry.request_log import Entry, RequestLog
from glm_image.telemetry.tracing import RequestTracing

if TYPE_CHECKING:
    from glm_image.ar.engine import ArResult

logger = logging.getLogger(__name__)

DECODING_THREADS = 2
"""Requests whose source images are decoded at once."""


@dataclass(frozen=True)
class _Taken:
    """A request that was let in."""

    asked: GenerationParameters
    context: RequestContext
    answer: Responder
    entry: Entry
    following: StreamOptions


class ArBackend:
    """The Triton Python model of the first stage."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the engine on this instance's device."""
        bytes_tensors.install()
        instance = Instance.read(args, ArParameters)
        self._limits, self._timeouts = instance.parameters.limits, instance.parameters.timeouts
        log = RequestLog(instance.name, is_last=False)
        self._spans = RequestTracing(instance.name)
        self._metrics = MetricsExporter(AR_METRICS, instance)
        self._open = PendingResponses()
        self._gathering = AdmissionFeed.of(instance)
        self._engine, self._pulse = _load(instance, self._metrics, self._open, self._gathering)
        self._reception = RequestGate(
            instance, RequestRegistry("ar_queue", "handed_on"), AR_OUTCOMES, self._metrics.record, log
        )
        self._decoder = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="ar-decoder")
        self._max_decoding = instance.parameters.engine.max_queue
        self._may_decode = threading.Semaphore(self._max_decoding)
        orders = {"drain": partial(_unload, ENTRY_MODELS), "unload": partial(_unload, STAGES)}
        self._pulse.start(self._engine.is_alive, orders if instance.index == 0 else {})

    def execute(self, requests: list[Any]) -> None:
        """Hands requests over; the answers go out later, from the engine's thread.

        Source images are decoded in threads, so that requests without them do not wait.
        """
        for request in requests:
            answer = self._open.add(Responder(request))
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

    def _accept(self, request: Any, answer: Responder, entry: Entry) -> None:
        context = RequestContext.with_timeout(request.request_id(), self._timeouts.of(request.timeout()))
        following = StreamOptions.read(request.parameters())
        context.arrived_ns = context.arrived_ns if following.arrived_ns is None else following.arrived_ns
        entry.follow(context)
        self._spans.follow(request, context)
        self._reception.begin(context, answer)
        asked = read_request(request)
        entry.note(asked.prompt, **_told(asked))
        taken = _Taken(asked, context, answer, entry, following)
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
            taken.context.check()
            self._submit(taken)
        except Exception as error:  # whatever it is, the client must get an answer
            taken.answer.fail(error)
        finally:
            self._may_decode.release()

    def _submit(self, taken: _Taken) -> None:
        context = taken.context
        resolved = taken.asked.resolve(self._limits, self._engine.sampling, self._engine.source_rule)
        size = resolved.requested
        taken.entry.note(taken.asked.prompt, width=size.width, height=size.height, seed=resolved.seeds[0])
        if taken.following.previews and (grid := preview_of(resolved.grids)) is not None:
            context.on_preview = partial(self._hand_out_preview, context, grid, resolved.seeds[0])
        if self._gathering is not None:
            self._gathering.expect(context, len(resolved.seeds), taken.answer)
        self._engine.submit(context, resolved).add_done_callback(
            lambda done: _reply(taken.answer, context, resolved, done)
        )

    def _hand_out_preview(self, context: RequestContext, grid: Grid, seed: int, tokens: NDArray[np.int32]) -> None:
        self._reception.tell(
            context, lambda: {"preview": {"grid": list(grid), "tokens": tokens.tolist(), "seed": seed}}
        )


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
    instance: Instance[ArParameters],
    metrics: MetricsExporter,
    pending_responses: PendingResponses,
    gathering: AdmissionFeed | None,
) -> tuple[Any, Heartbeat]:
    place = instance.take_place(reserve_first=False)
    parameters = instance.parameters
    folder = parameters.checkpoint_folder  # before seconds of imports, so that a mistake is reported early
    # The engine imports torch and transformers, which must not happen before the instance's device is chosen.
    from glm_image.ar.engine import ArEngine  # noqa: PLC0415
    from glm_image.checkpoint.checkpoint import Checkpoint  # noqa: PLC0415
    from glm_image.devices.open import open_device  # noqa: PLC0415

    device = open_device(place.local_names[0], display_name=place.devices[0])
    logger.info("loading the decoder on %s", device)
    checkpoint = Checkpoint.open(folder, parameters.load_format)
    pulse = Heartbeat(instance.name, instance.hang_seconds(device))
    engine = ArEngine(
        checkpoint,
        device,
        parameters.engine,
        metrics.record,
        watched=pulse.watched,
        admission=None if gathering is None else gathering.admission,
        workers=instance.workers(place, device, pending_responses.end_process),
    )
    return engine, pulse


def read_request(request: Any) -> GenerationParameters:
    """Reads a request, not yet validated."""
    return GenerationParameters(**read_fields(Inputs(request), GenerationParameters))


def _reply(answer: Responder, context: RequestContext, resolved: ResolvedRequest, done: Future[ArResult]) -> None:
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
            "deadline_ns": np.array([context.deadline_ns]),
            "ar_metadata": text_array(json.dumps(ar_metadata(context, result.tokens))),
        }
    )

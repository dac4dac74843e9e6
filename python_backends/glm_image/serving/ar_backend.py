"""``glm_ar``: passes requests to the AR engine, which responds with their prior tokens."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from glm_image.ar.admission import Admission, BatchAdmission
from glm_image.ar.metrics import AR_LATENCIES, AR_METRICS, AR_OUTCOMES
from glm_image.config.instance import is_pool_member
from glm_image.config.parameters import ArParameters
from glm_image.errors import QueueFullError
from glm_image.ipc.protocol import socket_directory
from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.lifecycle.byte_budget import ByteBudget
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.dit_load import DitLoadFeed
from glm_image.lifecycle.metadata import ar_metadata
from glm_image.lifecycle.preview_rpc import PreviewPublisher
from glm_image.lifecycle.registry import RequestState
from glm_image.request.geometry import preview_of
from glm_image.request.parameters import GenerationParameters, ResolvedRequest
from glm_image.request.source_images import check_count
from glm_image.request.stages import Stage
from glm_image.serving.stage_backend import StageBackend, StageCall
from glm_image.serving.tensors import Inputs, text_array
from glm_image.serving.unloading import unload_commands

if TYPE_CHECKING:
    from glm_image.ar.engine import ArResult
    from glm_image.checkpoint.checkpoint import Checkpoint
    from glm_image.devices.base import Device
    from glm_image.parallel.rank_group import WorkerConfig

logger = logging.getLogger(__name__)

DECODING_THREADS: Final = 2


class ArBackend(StageBackend):
    """The Triton Python model of the AR stage."""

    parameters = ArParameters
    reserves_first_device = False
    metrics = AR_METRICS
    counters = AR_OUTCOMES
    latencies = AR_LATENCIES

    @property
    def outcome(self) -> RequestState:
        return RequestState.FINISHED if is_pool_member() else RequestState.FORWARDED

    def _load_engine(
        self, parameters: ArParameters, checkpoint: Checkpoint, device: Device, workers: WorkerConfig
    ) -> None:
        from glm_image.ar.engine import ArEngine  # noqa: PLC0415

        self._dit_load = _dit_load_feed()
        self._budget = ByteBudget("glm_ar", parameters.max_queue_bytes, self._waiting_bytes)
        self._observers.append(self._budget)
        if self._dit_load is not None:
            self._observers.append(self._dit_load)
        self._max_decoding = parameters.engine.max_queue
        self._decoding_slots = threading.Semaphore(self._max_decoding)
        self._decoders = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="ar-decoder")
        admission = _admission(parameters, self._dit_load)
        self._engine = ArEngine(
            checkpoint, device, parameters.engine, self._metrics.record, workers, self._heartbeat.watched, admission
        )

    def _start_heartbeat(self) -> None:
        self._heartbeat.start(self._engine.is_alive, unload_commands("glm_ar", self._instance.index))

    def _slots(self, parameters: ArParameters) -> int:
        return parameters.engine.max_num_seqs

    def _close_engine(self) -> None:
        self._decoders.shutdown(wait=True)
        self._engine.close()
        if self._dit_load is not None:
            self._dit_load.close()

    def _handle(self, call: StageCall, inputs: Inputs) -> None:
        """Submits a request to the engine; one with source images from a thread, as decoding them takes long."""
        context = call.context
        if call.header.options.arrived_ns is not None:
            context.arrived_ns = context.received_ns = call.header.options.arrived_ns
        context.start(Stage.AR_QUEUE)
        parameters = GenerationParameters(**inputs.fields(GenerationParameters))
        context.num_images = parameters.num_images
        context.attributes = _log_attributes(parameters)
        self._check_revision(parameters.revision)
        if parameters.images is None:
            self._submit(call, parameters)
            return
        # Before it waits for a thread: what is invalid is refused immediately, and what is too large waits for nothing.
        check_count(len(parameters.images), self._limits)
        parameters.check_shared(self._limits)
        context.input_bytes = parameters.input_bytes
        self._budget.hold(context, "image", context.input_bytes)
        if self._decoding_slots.acquire(blocking=False):
            self._decoders.submit(self._decode_and_submit, call, parameters)
        else:
            raise QueueFullError(
                f"glm_ar decodes the source images of {self._max_decoding} requests, as many as max_queue allows; "
                "try again later"
            )

    def _waiting_bytes(self) -> int:
        """The bytes of the requests that wait in Triton for ``glm_dit``, where its load is known."""
        return 0 if self._dit_load is None else self._dit_load.load.bytes()

    def _decode_and_submit(self, call: StageCall, parameters: GenerationParameters) -> None:
        try:
            with call.responder.errors_sent():
                call.context.check()
                self._submit(call, parameters)
        finally:
            self._decoding_slots.release()

    def _submit(self, call: StageCall, parameters: GenerationParameters) -> None:
        context = call.context
        resolved = parameters.resolve(self._limits, self._engine.sampling, self._engine.source_rule)
        width, height, seed = resolved.requested.width, resolved.requested.height, resolved.seeds[0]
        context.attributes |= {"width": width, "height": height, "seed": seed}
        self._budget.hold(context, "image", resolved.source_bytes)
        preview = preview_of(resolved.grids)
        if call.header.options.previews and preview is not None:
            context.add_observer(PreviewPublisher(self._registry, preview, seed))
        outputs = partial(_outputs, self._checkpoint["fingerprint"], context, resolved)
        call.responder.send_result(self._engine.submit(context, resolved), outputs)


def _outputs(
    fingerprint: str, context: RequestContext, resolved: ResolvedRequest, result: ArResult
) -> dict[str, NDArray[Any]]:
    return {
        "prior_token_ids": result.prior_token_ids,
        "prior_grid": np.array(resolved.target),
        "source_token_ids": result.source_token_ids,
        "source_grids": np.array(result.source_grids).reshape(-1, 2),
        "resolved_seed": np.array([resolved.seeds[0]]),
        "resolved_size": np.array(resolved.requested),
        "deadline_ns": np.array([context.deadline_ns]),
        "ar_metadata": text_array(json.dumps(ar_metadata(context, result.tokens, fingerprint))),
    }


def _dit_load_feed() -> DitLoadFeed | None:
    """Returns the source of the DiT's load; None where it cannot be known."""
    folder = socket_directory()
    return None if folder is None else DitLoadFeed(folder)


def _admission(parameters: ArParameters, dit_load: DitLoadFeed | None) -> Admission | None:
    """Returns the policy that ``admission`` names; None = immediate."""
    if parameters.admission != "gathered":
        return None
    if dit_load is None:
        logger.warning(
            "admission is gathered, but %s is not set, so the load of glm_dit is unknown: requests are admitted "
            "immediately",
            RUN_DIRECTORY_VARIABLE,
        )
        return None
    return BatchAdmission(dit_load.load)


def _log_attributes(parameters: GenerationParameters) -> dict[str, Any]:
    return {
        "width": parameters.width,
        "height": parameters.height,
        "images": parameters.num_images,
        "steps": parameters.num_inference_steps,
        "seed": parameters.seed,
        "sources": len(parameters.images or ()),
        "output_format": parameters.output_format,
        "prompt": parameters.prompt,
    }

"""``glm_dit``: holds some requests, whose images take turns, and blocks while it holds as many as it may.

Meanwhile Triton queues the others, and gives the next one to an instance that does not block.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glm_image.config.parameters import DitParameters
from glm_image.dit.metrics import DIT_LATENCIES, DIT_METRICS, DIT_OUTCOMES, IMAGE_CHECKS, PROMPT_CHECKS
from glm_image.errors import GlmImageError, InvalidInputError
from glm_image.ipc.protocol import Message, socket_directory
from glm_image.lifecycle.busy_period import BusyPeriod
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.dit_load import TOPIC, DitLoadReporter
from glm_image.lifecycle.dit_room import DitRoom
from glm_image.lifecycle.metadata import check_fingerprint, read_ar_metadata, request_metadata
from glm_image.lifecycle.preview_rpc import (
    PREVIEW,
    LatentPreviewPublisher,
    error_reply,
    read_preview_request,
    reply_with_preview,
)
from glm_image.lifecycle.registry import RequestState
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid, Size
from glm_image.request.parameters import PaintRequest, SharedParameters, consecutive_seeds, random_seed
from glm_image.request.stages import AR_STAGES, Stage
from glm_image.safety.checks import SafetyChecks
from glm_image.serving import bytes_tensors
from glm_image.serving.stage_backend import StageBackend, StageCall
from glm_image.serving.tensors import Inputs, text_array
from glm_image.serving.unloading import unload_commands

if TYPE_CHECKING:
    from glm_image.checkpoint.checkpoint import Checkpoint
    from glm_image.devices.base import Device
    from glm_image.dit.engine import DitResult
    from glm_image.parallel.rank_group import WorkerConfig


class DitBackend(StageBackend):
    """The Triton Python model of the DiT stage."""

    parameters = DitParameters
    reserves_first_device = True
    metrics = DIT_METRICS
    counters = DIT_OUTCOMES
    latencies = DIT_LATENCIES

    @property
    def outcome(self) -> RequestState:
        return RequestState.FINISHED

    def initialize(self, args: Mapping[str, str]) -> None:
        self._busy = BusyPeriod()
        super().initialize(args)

    def execute(self, requests: list[Any]) -> None:
        self._busy.begin()
        try:
            super().execute(requests)
            self._room.wait()
        finally:
            self._busy.end()

    def _load_engine(
        self, parameters: DitParameters, checkpoint: Checkpoint, device: Device, workers: WorkerConfig
    ) -> None:
        from glm_image.dit.engine import DitEngine  # noqa: PLC0415

        name, most = self._instance.name, parameters.engine.max_num_requests
        load_reporter = DitLoadReporter(name, self._ipc.publish)
        self._room = DitRoom(most, load_reporter, name, self._instance.siblings, socket_directory())
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="dit-request")
        self._observers.append(load_reporter)
        self._topics[TOPIC] = load_reporter.publish_load
        self._handlers[PREVIEW] = self._preview
        self._engine = DitEngine(
            checkpoint,
            device,
            parameters.engine,
            self._metrics.record,
            workers,
            self._heartbeat.watched,
            parameters.provenance,
            SafetyChecks(parameters.checks, PROMPT_CHECKS, IMAGE_CHECKS, self._metrics.record),
        )
        self._observers.append(LatentPreviewPublisher(self._registry, self._engine.intermediate_images.finish))

    def _start_heartbeat(self) -> None:
        self._heartbeat.start(commands=unload_commands("glm_dit", self._instance.index))

    def _slots(self, parameters: DitParameters) -> int:
        return 1

    def _close_engine(self) -> None:
        self._threads.shutdown(wait=True)
        self._engine.close()
        self._room.close()

    def _handle(self, call: StageCall, inputs: Inputs) -> None:
        """Checks a request and passes it to a thread of its own."""
        request = read_request(inputs)
        _adopt(call, inputs, request, self._busy.since_ns)
        call.context.start(Stage.DIT_QUEUE)
        self._check_revision(request.revision)
        check_fingerprint(request.ar_metadata, self._checkpoint["fingerprint"])
        request.check(self._limits, self._engine.codebook_size)
        self._threads.submit(self._paint, call, request)

    def _paint(self, call: StageCall, request: PaintRequest) -> None:
        """Denoises the images of a request; the response follows when they are decoded and encoded."""
        context = call.context
        with call.responder.errors_sent():
            call.responder.send_result(
                self._engine.paint(context, request, self._limits), partial(self._outputs, context, request)
            )

    def _outputs(self, context: RequestContext, request: PaintRequest, result: DitResult) -> dict[str, NDArray[Any]]:
        engine = self._engine
        metadata = request_metadata(
            context, request, engine.model, engine.attention_backend, result.labels, result.blurred
        )
        return {
            "images": result.pixels if request.output_format == "raw" else np.zeros((0, 0, 0, 3)),
            "images_base64": text_array(*(base64.b64encode(file).decode() for file in result.encoded)),
            "metadata": text_array(json.dumps(metadata)),
        }

    def _preview(self, message: Message) -> Message | Future[Message]:
        """Handles ``glm_image.lifecycle.preview_rpc.request_preview``, in the IPC server's thread."""
        context, request = read_preview_request(message)
        reply: Future[Message] = Future()
        try:
            preview = self._engine.preview(context, request, self._limits)
        except GlmImageError as error:
            return error_reply(error)
        unlink = self._registry.link(context)
        preview.add_done_callback(lambda _: unlink())
        preview.add_done_callback(lambda done: reply_with_preview(reply, done))
        return reply


def _adopt(call: StageCall, inputs: Inputs, request: PaintRequest, busy_since_ns: int) -> None:
    """Continues the request that ``glm_ar`` began: its id, arrival, deadline and stage times.

    A request that a client sends directly states no arrival. It counts as arrived at ``busy_since_ns``, so that a
    cancel sent while it waited in Triton's queue applies to it.

    The ensemble gives each stage the whole timeout of the request, so the deadline comes from the first stage.
    """
    context, metadata = call.context, request.ar_metadata
    deadline_ns = inputs.integer("deadline_ns") or 0
    if deadline_ns < 0:
        raise InvalidInputError.of("deadline_ns", deadline_ns, "0 (none) and above")
    context.id = call.header.id or metadata.get("request_id", context.id)
    streamed_ns = call.header.options.arrived_ns
    context.arrived_ns = streamed_ns or metadata.get("arrived_ns", busy_since_ns)
    context.queue_began_ns = busy_since_ns
    context.received_ns = streamed_ns or metadata.get("arrived_ns", context.received_ns)
    # That of this stage too: it holds ``max_timeout_ms``, which the deadline of a client need not.
    context.deadline_ns = min(filter(None, (deadline_ns, context.deadline_ns)), default=0)
    seconds = metadata.get("seconds", {})
    context.seconds = {stage: seconds[stage] for stage in AR_STAGES if stage in seconds}
    context.latent_preview_every = call.header.options.latent_preview_every
    context.num_images = len(request.seeds)
    context.attributes = {
        "width": request.requested.width,
        "height": request.requested.height,
        "images": len(request.seeds),
        "steps": request.num_inference_steps,
        "seed": request.seeds[0] if request.seeds else None,
        "sources": len(request.source_grids),
        "output_format": request.output_format,
        "prompt": request.prompt,
    }


def read_request(inputs: Inputs) -> PaintRequest:
    """Reads the request of ``glm_ar``, or of a client with tokens of its own; not validated yet.

    Tensors are copied: the memory of Triton's request is released before its images are denoised.
    """
    tokens, sides = _required(inputs, "prior_token_ids"), _required(inputs, "prior_grid")
    grid = Grid(*map(int, sides))
    size = inputs.array("resolved_size")
    seed = inputs.integer("resolved_seed")
    return PaintRequest(
        prior_token_ids=tokens.copy(),
        grid=grid,
        requested=Size(*(side * PIXELS_PER_TOKEN for side in grid) if size is None else map(int, size)),
        # ``PaintRequest.check`` refuses more rows than that.
        seeds=consecutive_seeds(random_seed() if seed is None else seed, min(len(tokens), bytes_tensors.MAX_STRINGS)),
        ar_metadata=read_ar_metadata(inputs.text("ar_metadata") or ""),
        source_grids=_source_grids(inputs),
        **inputs.given(source_token_ids=_copy(inputs.array("source_token_ids"))),
        **inputs.fields(SharedParameters),
    )


def _copy(array: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if array is None else array.copy()


def _source_grids(inputs: Inputs) -> tuple[Grid, ...]:
    array = inputs.array("source_grids")
    if array is None:
        return ()
    if len(array) > bytes_tensors.MAX_STRINGS:  # before a loop over millions
        raise InvalidInputError.of("source_grids' number of rows", len(array), "one for each image")
    return tuple(Grid(*map(int, pair)) for pair in array)


def _required(inputs: Inputs, name: str) -> NDArray[Any]:
    # Triton checks the number of inputs, not their names.
    array = inputs.array(name)
    if array is None:
        raise InvalidInputError(f"{name} is missing; allowed: the tensor that glm_ar gives")
    return array

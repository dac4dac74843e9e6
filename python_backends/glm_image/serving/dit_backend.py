"""``glm_dit``: blocks while a picture is denoised, so that Triton queues for it; the rest goes on in a thread."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glm_image.config.cache import cache_settings
from glm_image.config.instance import Instance
from glm_image.config.schema import DIT_PARAMETERS
from glm_image.dit.metrics import DIT_METRICS, DIT_OUTCOMES
from glm_image.errors import InvalidInputError
from glm_image.ipc.protocol import Message
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.lifecycle.downstream import TOPIC, DitLoadReporter
from glm_image.lifecycle.metadata import read_ar_metadata, request_metadata
from glm_image.lifecycle.preview_rpc import PREVIEW, answer_preview, packed_picture, read_preview
from glm_image.lifecycle.registry import RequestRegistry
from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid, Size
from glm_image.request.parameters import PaintRequest, consecutive_seeds, random_seed
from glm_image.serving import bytes_tensors
from glm_image.serving.exit import end_process
from glm_image.serving.metrics_export import MetricsExporter
from glm_image.serving.pending_responses import PendingResponses
from glm_image.serving.request_gate import RequestGate
from glm_image.serving.responder import Responder
from glm_image.serving.tensors import Inputs, text_array
from glm_image.telemetry.heartbeat import Heartbeat
from glm_image.telemetry.request_log import Entry, RequestLog
from glm_image.telemetry.tracing import RequestTracing

if TYPE_CHECKING:
    from glm_image.dit.engine import DitResult

logger = logging.getLogger(__name__)

IDLE_NS = NANOSECONDS // 20
"""Longer than Triton takes to hand an instance the next request that waits."""


class BusyPeriod:
    """When a request that does not say it may have arrived: not before the instance was last idle."""

    def __init__(self) -> None:
        self.since_ns = 0
        self._ended_ns = 0

    def begin(self) -> None:
        """Notes that a request has come out of the queue."""
        now = time.monotonic_ns()
        if now - self._ended_ns > IDLE_NS:
            self.since_ns = now

    def end(self) -> None:
        """Notes that the instance asks for the next."""
        self._ended_ns = time.monotonic_ns()


class DitBackend:
    """The Triton Python model of the second stage."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the engine on this instance's device."""
        bytes_tensors.install()
        instance = Instance.read(args, DIT_PARAMETERS)
        place = instance.take_place(reserve_first=True)
        # Read before seconds of imports, so that what is not allowed is told at once.
        parameters, folder, cache = instance.parameters, instance.checkpoint, cache_settings(instance)
        # The engine imports torch and diffusers, which must not happen before the instance's device is chosen.
        from glm_image.checkpoint.checkpoint import Checkpoint  # noqa: PLC0415
        from glm_image.devices.open import named_dtype, open_device  # noqa: PLC0415
        from glm_image.dit.engine import DitEngine  # noqa: PLC0415
        from glm_image.dit.settings import DitSettings  # noqa: PLC0415

        self._limits, self._timeouts = instance.limits, instance.timeouts
        self._checkpoint = Checkpoint.open(folder, parameters["load_format"])
        device = open_device(place.local_names[0], display_name=place.devices[0])
        logger.info("loading the transformer on %s", device)
        self._spans = RequestTracing(instance.name)
        self._metrics = MetricsExporter(DIT_METRICS, instance)
        self._open = PendingResponses()
        self._pulse = Heartbeat(instance.name, instance.seconds("hang_seconds", device.hang_seconds))
        self._engine = DitEngine(
            self._checkpoint,
            device,
            DitSettings(
                dtype=named_dtype(parameters["dtype"]),
                memory_utilization=instance.share("memory_utilization"),
                warmup_sizes=instance.sizes("warmup_sizes", device.warmup_sizes),
                parallel=parameters["parallel"],
                cache=cache,
                quantization=parameters["quantization"],
                vae_tiling=parameters["vae_tiling"],
                largest_side=self._limits.max_side,
            ),
            self._metrics.record,
            watched=self._pulse.watched,
            workers=instance.workers(place, device, self._open.end_process),
        )
        log = RequestLog(instance.name, is_last=True)
        self._painting = DitLoadReporter(instance.name)
        self._reception = RequestGate(
            instance,
            RequestRegistry("condition", "finished"),
            DIT_OUTCOMES,
            self._metrics.record,
            log,
            handlers={PREVIEW: self._preview},
            topics={TOPIC: self._painting.tell},
        )
        self._painting.publish = self._reception.publish
        self._busy = BusyPeriod()
        self._pulse.start()

    def execute(self, requests: list[Any]) -> None:
        """Denoises requests one after the other; each is answered when its pictures are decoded and encoded."""
        self._busy.begin()
        for request in requests:
            answer = self._open.add(Responder(request))
            entry = self._reception.expect(request, answer)
            try:
                self._paint(request, answer, entry)
            except Exception as error:  # whatever it is, the client must get an answer
                answer.fail(error)
        self._busy.end()

    def finalize(self) -> None:
        """Finishes what is denoised."""
        self._pulse.close()
        self._engine.close()
        self._reception.close()
        self._metrics.close()
        self._spans.close()
        end_process()

    def _paint(self, request: Any, answer: Responder, entry: Entry) -> None:
        inputs = Inputs(request)
        paint = read_request(inputs)
        context = self._job(request, inputs, paint)
        entry.follow(context, paint.ar_metadata.get("seconds"))
        entry.note(paint.prompt, **_told(paint))
        self._spans.follow(request, context)
        answer.when_ended(lambda _: self._painting.end(context))
        self._painting.begin(context, len(paint.seeds))
        self._reception.begin(context, answer)
        self._show(context, StreamOptions.read(request.parameters()).pictures_every)
        painted = self._engine.paint(context, paint, self._limits)
        painted.add_done_callback(partial(self._answer, answer, context, paint))

    def _show(self, context: RequestContext, pictures_every: int) -> None:
        def show(pixels: NDArray[np.uint8]) -> None:
            self._reception.tell(context, lambda: {"picture": packed_picture(pixels)})

        context.pictures_every, context.on_picture = pictures_every, show

    def _preview(self, question: Message) -> Future[Message]:
        """Answers ``glm_image.lifecycle.preview_rpc.ask_preview`` over the bus, in the bus's thread."""
        context, paint = read_preview(question)
        paint.check(self._limits, self._engine.codebook_size)
        answer: Future[Message] = Future()
        done = self._engine.preview(context, paint)
        let_go = self._reception.beside(context)
        done.add_done_callback(lambda _: let_go())
        done.add_done_callback(lambda done: answer_preview(answer, done))
        return answer

    def _job(self, request: Any, inputs: Inputs, paint: PaintRequest) -> RequestContext:
        told = paint.ar_metadata
        # As a step of the ensemble it is told the whole request's timeout again; the first stage knows what is left.
        timeout_us = self._timeouts.of(request.timeout())
        context = RequestContext.with_timeout(request.request_id() or told.get("request_id", ""), timeout_us)
        context.arrived_ns = told.get("arrived_ns", self._busy.since_ns)
        deadline_ns = inputs.integer("deadline_ns") or 0
        if deadline_ns < 0:
            raise InvalidInputError.of("deadline_ns", deadline_ns, "0 (none) and above")
        context.deadline_ns = deadline_ns or context.deadline_ns
        return context

    def _answer(
        self, answer: Responder, context: RequestContext, paint: PaintRequest, painted: Future[DitResult]
    ) -> None:
        try:
            result = painted.result()
            raw = paint.output_format == "raw"
            metadata = request_metadata(self._checkpoint, context, paint, self._engine.attention_backend)
            answer.send(
                {
                    "images": result.pixels if raw else np.zeros((0, 0, 0, 3)),
                    "images_base64": text_array(*(base64.b64encode(file).decode() for file in result.encoded)),
                    "metadata": text_array(json.dumps(metadata)),
                }
            )
        except Exception as error:  # whatever it is, the client must get an answer
            answer.fail(error)


def _told(paint: PaintRequest) -> dict[str, Any]:
    """What the log tells of a request."""
    return {
        "width": paint.requested.width,
        "height": paint.requested.height,
        "images": len(paint.seeds),
        "steps": paint.num_inference_steps,
        "seed": paint.seeds[0] if paint.seeds else None,
        "sources": len(paint.source_grids),
        "output_format": paint.output_format,
    }


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
        seeds=consecutive_seeds(random_seed() if seed is None else seed, min(len(tokens), bytes_tensors.MAX_STRINGS)),
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
    if len(array) > bytes_tensors.MAX_STRINGS:  # before a loop over millions
        raise InvalidInputError.of("source_grids' number of rows", len(array), "one for each image")
    return tuple(Grid(*map(int, pair)) for pair in array)


def _required(inputs: Inputs, name: str) -> NDArray[Any]:
    # Triton refuses too few inputs, and does not look which they are.
    array = inputs.array(name)
    if array is None:
        raise InvalidInputError(f"{name} is missing; allowed: the tensor that glm_ar gives")
    return array

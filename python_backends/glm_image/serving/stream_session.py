"""One stream: calls the stages for a request, while its progress is relayed; of a whole server, or of one stage."""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.config.schema import DIT_INPUTS, OUTPUTS, REQUEST_INPUTS, SHARED_INPUTS, STAGE_TENSORS
from glm_image.errors import CancelledError, InvalidInputError, UnavailableError
from glm_image.ipc.protocol import Event, socket_directory
from glm_image.lifecycle.call_header import CallHeader
from glm_image.lifecycle.events import EventBuilder
from glm_image.lifecycle.lru import LatestEntries
from glm_image.lifecycle.preview_rpc import PreviewSkippedError, request_preview
from glm_image.lifecycle.stream_options import MAX_TRACE_CHARACTERS, StreamOptions
from glm_image.request.limits import Limits
from glm_image.request.parameters import ArStreamParameters, DitStreamParameters, PreviewParameters
from glm_image.request.stages import Stage
from glm_image.request.tensors import TensorSpec, check_fields
from glm_image.serving.errors import StageError
from glm_image.serving.stream_events import NO_OUTPUTS, EventSender, ProgressRelay, encoded_image
from glm_image.serving.tensors import Inputs
from glm_image.telemetry.tracing import trace_of

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]


class StreamSession(ABC):
    """A request of a model that streams.

    Raises:
        InvalidInputError: the timeout, or an input that the stages do not take, is not allowed.
    """

    inputs: ClassVar[tuple[TensorSpec, ...]]
    first_stage: ClassVar[Stage] = Stage.AR_QUEUE
    no_outputs: ClassVar[Arrays] = NO_OUTPUTS

    def __init__(self, request: Any, sender: EventSender, dit_seconds: LatestEntries[Hashable, float]) -> None:
        self._sender, self._dit_seconds = sender, dit_seconds
        header = CallHeader.read(request)
        self._request_id = header.id or uuid.uuid4().hex
        inputs = Inputs(request, header.parameters)
        # Copied, as the request's memory is released before the session ends.
        given = inputs.given(**{spec.name: inputs.array_or_parameter(spec) for spec in self.inputs})
        self._inputs: Arrays = {name: array.copy() for name, array in given.items()}
        self._timeout_us = header.timeout_us
        trace = trace_of(request)
        if trace is not None and len(trace) > MAX_TRACE_CHARACTERS:
            trace = None
        self._options = replace(self._read_options(inputs), trace=trace)
        self._kind: Hashable = tuple(
            (name, array.tobytes()) for name, array in self._inputs.items() if array.dtype != np.object_
        )
        self._builder = EventBuilder(
            self._request_id, sender.arrived_ns, dit_seconds.get(self._kind), first_stage=self.first_stage
        )

    def run(self) -> None:
        """Calls the stages and sends the last response: their outputs, or an error."""
        # The executor starts its thread for the first preview, and is left when that has been sent.
        with ThreadPoolExecutor(1, thread_name_prefix="preview") as previewer, self._sender.errors_sent():
            with ProgressRelay(
                socket_directory(),
                self._request_id,
                self._builder,
                self._sender,
                on_preview=lambda folder, event: previewer.submit(self._send_preview, folder, event),
            ) as relay:
                outputs = self._generate(relay)
            self._sender.send_last(self._last_event(), outputs)

    def _last_event(self) -> Event:
        return self._builder.last()

    @abstractmethod
    def _read_options(self, inputs: Inputs) -> StreamOptions:
        """Reads the inputs that only the stream has."""

    @abstractmethod
    def _generate(self, relay: ProgressRelay) -> Arrays:
        """Returns the outputs of the last response."""

    @abstractmethod
    def _send_preview(self, folder: Path, event: Event) -> None:
        """Handles an event with the tokens of the preview."""

    def _call(self, model: str, inputs: Arrays, outputs: Iterable[TensorSpec]) -> Arrays:
        names = [spec.name for spec in outputs]
        answer = pb_utils.InferenceRequest(
            model_name=model,
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            requested_output_names=names,
            request_id=self._request_id,
            timeout=self._timeout_us,
            parameters=self._options.parameters(),
        ).exec()
        if answer.has_error():
            raise StageError(answer.error().message())
        return {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in names}

    def _paint_fields(self) -> dict[str, Any]:
        """Returns the fields of the request that a preview has in common with its image."""
        fields: dict[str, Any] = {"prompt": self._text("prompt"), "negative_prompt": self._text("negative_prompt")}
        if "glyph_text" in self._inputs:
            fields["glyph_text"] = [text.decode("utf-8", "replace") for text in self._inputs["glyph_text"]]
        if "guidance_scale" in self._inputs:
            fields["guidance_scale"] = float(self._inputs["guidance_scale"][0])
        return fields

    def _text(self, name: str) -> str:
        array = self._inputs.get(name)
        return "" if array is None else array[0].decode("utf-8", "replace")  # the stages refuse what is not UTF-8


class WholeStream(StreamSession):
    """``glm_image_stream``: calls both stages, and keeps the DiT's latest duration for each kind of request."""

    inputs = REQUEST_INPUTS

    def _read_options(self, inputs: Inputs) -> StreamOptions:
        previews = PreviewParameters(**inputs.fields(PreviewParameters))
        check_fields(previews, Limits())
        self._preview_steps = previews.preview_steps
        return StreamOptions(self._sender.arrived_ns, previews.preview_steps > 0, previews.preview_every)

    def _generate(self, relay: ProgressRelay) -> Arrays:
        prior = self._call("glm_ar", self._inputs, STAGE_TENSORS)
        if relay.has_cancelled:
            raise CancelledError(f"request {self._request_id} was cancelled")
        dit_inputs = {spec.name: self._inputs[spec.name] for spec in SHARED_INPUTS if spec.name in self._inputs}
        started = time.monotonic()
        outputs = self._call("glm_dit", {**dit_inputs, **prior}, OUTPUTS)
        self._dit_seconds.put(self._kind, time.monotonic() - started)
        return outputs

    def _send_preview(self, folder: Path, event: Event) -> None:
        """Has ``glm_dit`` render the preview of the tokens that an event brought, and sends it."""
        parameters = {**self._paint_fields(), "num_inference_steps": self._preview_steps}
        try:
            pixels = request_preview(folder, self._request_id, event["preview"], parameters)
            self._sender.send_image(self._builder.image("preview", event), pixels)
        except Exception as error:  # the request goes on without it
            if not isinstance(error, PreviewSkippedError):
                logger.exception("request %s gets no preview", self._request_id)
            self._sender.send_event(self._builder.skipped(event, PreviewSkippedError.of(error).fields()))


class ArStream(StreamSession):
    """``glm_ar_stream``: calls ``glm_ar``, whose tokens another server renders."""

    inputs = REQUEST_INPUTS
    no_outputs: ClassVar[Arrays] = {}

    def _read_options(self, inputs: Inputs) -> StreamOptions:
        own = ArStreamParameters(**inputs.fields(ArStreamParameters))
        check_fields(own, Limits())
        return StreamOptions(self._sender.arrived_ns, own.preview_tokens > 0)

    def _generate(self, relay: ProgressRelay) -> Arrays:
        return self._call("glm_ar", self._inputs, STAGE_TENSORS)

    def _last_event(self) -> Event:
        return self._builder.last("tokens")

    def _send_preview(self, folder: Path, event: Event) -> None:
        self._sender.send_event(self._builder.preview_tokens(event))


class DitStream(StreamSession):
    """``glm_dit_stream``: calls ``glm_dit``, or has it render a preview, for tokens that another server made."""

    inputs = DIT_INPUTS
    first_stage = Stage.DIT_QUEUE

    def _read_options(self, inputs: Inputs) -> StreamOptions:
        own = DitStreamParameters(**inputs.fields(DitStreamParameters))
        check_fields(own, Limits())
        self._is_preview = own.is_preview > 0
        self._skipped: PreviewSkippedError | None = None
        self._steps = inputs.integer("num_inference_steps")
        return StreamOptions(self._sender.arrived_ns, latent_preview_every=own.preview_every)

    def _generate(self, relay: ProgressRelay) -> Arrays:
        return self._preview() if self._is_preview else self._call("glm_dit", self._inputs, OUTPUTS)

    def _preview(self) -> Arrays:
        folder = socket_directory()
        if folder is None:
            raise UnavailableError("this server renders no previews: it was started without a run directory")
        tokens, grid = (self._inputs.get(name) for name in ("prior_token_ids", "prior_grid"))
        if tokens is None or len(tokens) != 1 or grid is None:
            raise InvalidInputError(
                "is_preview is 1 without prior_token_ids of one image and prior_grid; allowed: both"
            )
        seed = self._inputs.get("resolved_seed")
        preview = {"grid": grid.tolist(), "tokens": tokens[0].tolist(), "seed": 0 if seed is None else int(seed[0])}
        steps = {} if self._steps is None else {"num_inference_steps": self._steps}
        try:
            pixels = request_preview(folder, self._request_id, preview, {**self._paint_fields(), **steps})
        except PreviewSkippedError as error:
            self._skipped = error
            return NO_OUTPUTS
        return {**NO_OUTPUTS, "images_base64": encoded_image(pixels)}

    def _last_event(self) -> Event:
        if self._skipped is not None:
            return {**self._builder.last("preview_skipped"), **self._skipped.fields()}
        return self._builder.last("preview" if self._is_preview else "image")

    def _send_preview(self, folder: Path, event: Event) -> None:
        """``glm_dit`` publishes no tokens."""

"""One stream: calls both stages for a request, while its progress is relayed."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.config.schema import OUTPUTS, REQUEST_INPUTS, SHARED_INPUTS, STAGE_TENSORS
from glm_image.errors import CancelledError
from glm_image.ipc.protocol import Event, socket_directory
from glm_image.lifecycle.call_header import CallHeader
from glm_image.lifecycle.events import EventBuilder
from glm_image.lifecycle.lru import LatestEntries
from glm_image.lifecycle.preview_rpc import PreviewSkippedError, request_preview
from glm_image.lifecycle.stream_options import MAX_TRACE_CHARACTERS, StreamOptions
from glm_image.request.limits import Limits
from glm_image.request.parameters import PreviewParameters
from glm_image.request.tensors import TensorSpec, check_fields
from glm_image.serving.errors import StageError
from glm_image.serving.stream_events import EventSender, ProgressRelay
from glm_image.serving.tensors import Inputs
from glm_image.telemetry.tracing import trace_of

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]


class StreamSession:
    """A request of ``glm_image_stream``; updates ``dit_seconds``, the DiT's latest duration for each kind of request.

    Raises:
        InvalidInputError: the timeout, or an input that the stages do not take, is not allowed.
    """

    def __init__(self, request: Any, sender: EventSender, dit_seconds: LatestEntries[Hashable, float]) -> None:
        self._sender, self._dit_seconds = sender, dit_seconds
        header = CallHeader.read(request)
        self._request_id = header.id or uuid.uuid4().hex
        inputs = Inputs(request, header.parameters)
        # Copied, as the request's memory is released before the session ends.
        given = inputs.given(**{spec.name: inputs.array_or_parameter(spec) for spec in REQUEST_INPUTS})
        self._inputs: Arrays = {name: array.copy() for name, array in given.items()}
        previews = PreviewParameters(**inputs.fields(PreviewParameters))
        check_fields(previews, Limits())
        self._preview_steps = previews.preview_steps
        self._timeout_us = header.timeout_us
        trace = trace_of(request)
        if trace is not None and len(trace) > MAX_TRACE_CHARACTERS:
            trace = None
        self._options = StreamOptions(sender.arrived_ns, previews.preview_steps > 0, previews.preview_every, trace)
        self._kind: Hashable = tuple(
            (name, array.tobytes()) for name, array in self._inputs.items() if array.dtype != np.object_
        )
        self._builder = EventBuilder(self._request_id, sender.arrived_ns, dit_seconds.get(self._kind))

    def run(self) -> None:
        """Calls both stages and sends the last response: their outputs, or an error."""
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
            self._sender.send_last(self._builder.last(), outputs)

    def _generate(self, relay: ProgressRelay) -> Arrays:
        prior = self._call("glm_ar", self._inputs, STAGE_TENSORS)
        if relay.has_cancelled:
            raise CancelledError(f"request {self._request_id} was cancelled")
        dit_inputs = {spec.name: self._inputs[spec.name] for spec in SHARED_INPUTS if spec.name in self._inputs}
        started = time.monotonic()
        outputs = self._call("glm_dit", {**dit_inputs, **prior}, OUTPUTS)
        self._dit_seconds.put(self._kind, time.monotonic() - started)
        return outputs

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

    def _send_preview(self, folder: Path, event: Event) -> None:
        """Has ``glm_dit`` render the preview of the tokens that an event brought, and sends it."""
        parameters: dict[str, Any] = {
            "prompt": self._text("prompt"),
            "negative_prompt": self._text("negative_prompt"),
            "num_inference_steps": self._preview_steps,
        }
        if "glyph_text" in self._inputs:
            parameters["glyph_text"] = [text.decode("utf-8", "replace") for text in self._inputs["glyph_text"]]
        if "guidance_scale" in self._inputs:
            parameters["guidance_scale"] = float(self._inputs["guidance_scale"][0])
        try:
            pixels = request_preview(folder, self._request_id, event["preview"], parameters)
            self._sender.send_image(self._builder.image("preview", event), pixels)
        except Exception as error:  # the request goes on without it
            if not isinstance(error, PreviewSkippedError):
                logger.exception("request %s gets no preview", self._request_id)
            self._sender.send_event(self._builder.skipped(event, PreviewSkippedError.of(error).fields()))

    def _text(self, name: str) -> str:
        array = self._inputs.get(name)
        return "" if array is None else array[0].decode("utf-8", "replace")  # ``glm_ar`` refuses what is not UTF-8

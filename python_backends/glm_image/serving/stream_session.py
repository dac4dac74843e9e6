"""One stream: calls both stages for a request, while its progress is relayed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.config.schema import OUTPUTS, REQUEST_INPUTS, SHARED_INPUTS, STAGE_TENSORS
from glm_image.errors import CancelledError
from glm_image.ipc.protocol import Event, socket_directory
from glm_image.lifecycle.events import EventBuilder
from glm_image.lifecycle.lru import LatestEntries
from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, PreviewParameters
from glm_image.request.tensors import TensorSpec, check_fields
from glm_image.serving.stream_events import EventSender, PreviewFetcher, ProgressRelay, StageError
from glm_image.serving.tensors import Inputs

Arrays = Mapping[str, NDArray[Any]]


class StageCaller:
    """Calls the stages of a request through Triton.

    Args:
        request_id: the id of the request.
        timeout_us: its timeout in microseconds; 0 = none.
        options: what the stages publish of it.
    """

    def __init__(self, request_id: str, timeout_us: int, options: StreamOptions) -> None:
        self._request_id, self._timeout_us, self._options = request_id, timeout_us, options

    def call(self, model: str, inputs: Arrays, outputs: Iterable[TensorSpec]) -> Arrays:
        """Returns a stage's outputs.

        Raises:
            StageError: it responded with an error.
        """
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


class StreamSession:
    """A request of ``glm_image_stream``.

    Args:
        request: Triton's request.
        sender: sends its responses.
        dit_seconds: how long the DiT took for the latest request of each kind; the session updates it.

    Raises:
        InvalidInputError: an input that the stages do not take is not allowed.
    """

    def __init__(self, request: Any, sender: EventSender, dit_seconds: LatestEntries[Hashable, float]) -> None:
        self._sender, self._dit_seconds = sender, dit_seconds
        self._request_id: str = request.request_id() or uuid.uuid4().hex
        inputs = Inputs(request)
        # Copied, as the request's memory is released before the session ends.
        given = inputs.given(**{spec.name: inputs.array(spec.name) for spec in REQUEST_INPUTS})
        self._inputs: Arrays = {name: array.copy() for name, array in given.items()}
        previews = PreviewParameters(**inputs.fields(PreviewParameters))
        check_fields(previews, Limits())
        timeout_us: int = request.timeout() or _timeout_of(request.parameters())
        options = StreamOptions(sender.arrived_ns, previews.preview_steps > 0, previews.preview_every)
        self._stages = StageCaller(self._request_id, timeout_us, options)
        self._kind: Hashable = tuple(
            (name, array.tobytes()) for name, array in self._inputs.items() if array.dtype != np.object_
        )
        self._builder = EventBuilder(self._request_id, sender.arrived_ns, dit_seconds.get(self._kind))
        self._previews = PreviewFetcher(
            self._request_id, self._prompts(), self._guidance_scale(), previews.preview_steps, self._send_preview
        )

    def run(self) -> None:
        """Calls both stages and sends the last response: their outputs, or an error."""
        try:
            with self._sender.errors_sent():
                with ProgressRelay(
                    socket_directory(), self._request_id, self._builder, self._sender, self._previews
                ) as relay:
                    outputs = self._generate(relay)
                self._sender.send(self._builder.last(), outputs, is_last=True)
        finally:
            self._previews.close()

    def _generate(self, relay: ProgressRelay) -> Arrays:
        prior = self._stages.call("glm_ar", self._inputs, STAGE_TENSORS)
        if relay.has_cancelled:
            raise CancelledError(f"request {self._request_id} was cancelled")
        dit_inputs = {spec.name: self._inputs[spec.name] for spec in SHARED_INPUTS if spec.name in self._inputs}
        started = time.monotonic()
        outputs = self._stages.call("glm_dit", {**dit_inputs, **prior}, OUTPUTS)
        self._dit_seconds.put(self._kind, time.monotonic() - started)
        return outputs

    def _send_preview(self, event: Event, pixels: NDArray[np.uint8]) -> None:
        self._sender.send_image(self._builder.image("preview", event), pixels)

    def _prompts(self) -> tuple[str, str]:
        return self._text("prompt"), self._text("negative_prompt")

    def _guidance_scale(self) -> float:
        array = self._inputs.get("guidance_scale")
        return GenerationParameters("").guidance_scale if array is None else float(array[0])

    def _text(self, name: str) -> str:
        array = self._inputs.get(name)
        return "" if array is None else array[0].decode("utf-8", "replace")  # ``glm_ar`` refuses what is not UTF-8


def _timeout_of(parameters: str) -> int:
    """Returns the timeout in microseconds; ``generate_stream`` passes it as an ordinary parameter."""
    timeout = json.loads(parameters or "{}").get("timeout")
    return timeout if type(timeout) is int and 0 < timeout < 2**63 else 0

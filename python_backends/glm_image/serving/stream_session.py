"""One stream: both stages one after the other, their progress, the pictures on the way, and its cancelling."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.config.schema import OUTPUTS, PAINTING_INPUTS, REQUEST_INPUTS, STAGE_TENSORS, TensorSpec
from glm_image.errors import CancelledError
from glm_image.ipc.client import EventListener
from glm_image.ipc.protocol import Event, socket_directory
from glm_image.lifecycle.control import control
from glm_image.lifecycle.events import DitSecondsByKind, EventBuilder
from glm_image.lifecycle.preview_rpc import PreviewTokens, ask_preview, unpacked_picture
from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.request import images
from glm_image.request.limits import check_range
from glm_image.request.parameters import GenerationParameters
from glm_image.serving.errors import relayed, triton_error
from glm_image.serving.tensors import Inputs, response, text_array

logger = logging.getLogger(__name__)

HOLD_SECONDS = 0.05
"""Before the first event: what is refused by then is answered with nothing but the error, over HTTP with its status."""
EVENT_SECONDS = 0.05
"""Between two events of progress, and two questions to Triton whether the caller has gone away."""
MAX_PREVIEW_STEPS = 50
DEFAULT_PREVIEW_STEPS = 6
MAX_STEPS = 200

Arrays = dict[str, NDArray[Any]]

NOTHING: Arrays = {
    "images": np.zeros((0, 0, 0, 3)),
    "images_base64": np.zeros(0, dtype=np.object_),
    "metadata": np.zeros(0, dtype=np.object_),
}


class StageError(Exception):
    """A stage answered with an error, which is answered in turn."""


class StreamSession:
    """A request of ``glm_image_stream``.

    Raises:
        InvalidInputError: an input that the stages do not take themselves is not allowed.
    """

    def __init__(self, request: Any, sender: Any, times: DitSecondsByKind) -> None:
        self._arrived_ns = time.monotonic_ns()
        self._id: str = request.request_id() or uuid.uuid4().hex
        self._timeout_us: int = request.timeout() or _timeout_of(request.parameters())
        self._times = times
        self._sender: Any = sender
        inputs = Inputs(request)
        # Copies, as the request's own memory is given back before this is done.
        given = inputs.given(**{spec.name: inputs.array(spec.name) for spec in REQUEST_INPUTS})
        self._inputs: Arrays = {name: array.copy() for name, array in given.items()}
        self._preview_steps = _number(inputs, "preview_steps", DEFAULT_PREVIEW_STEPS, MAX_PREVIEW_STEPS)
        self._pictures_every = _number(inputs, "preview_every", 0, MAX_STEPS)
        self._kind = tuple((name, array.tobytes()) for name, array in self._inputs.items() if array.dtype != np.object_)
        self._story = EventBuilder(self._id, self._arrived_ns, times.of(self._kind))
        self._bus = socket_directory()
        self._lock = threading.Lock()
        self._is_sent = False
        self._done = threading.Event()
        self._previews: list[threading.Thread] = []
        self._is_gone = False

    def run(self) -> None:
        """Takes the request through both stages and sends its last response; whatever happens, there is one."""
        try:
            with self._followed():  # pictures on the way are told before the last one
                outputs = self._generate()
            self._send(self._story.end(), outputs, is_last=True)
        except StageError as error:
            self._send_error(relayed(str(error)))
        except Exception as error:  # whatever it is, the client must get an answer
            self._send_error(triton_error(error))
        finally:
            for preview in self._previews:
                preview.join()

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Tells the progress of what is done within, to its end."""
        follower = threading.Thread(target=self._follow, name="stream-follower", daemon=True)
        follower.start()
        try:
            yield
        finally:
            self._done.set()
            follower.join()

    def _generate(self) -> Arrays:
        following = StreamOptions(self._arrived_ns, self._preview_steps > 0, self._pictures_every)
        prior = self._call("glm_ar", self._inputs, STAGE_TENSORS, following)
        if self._is_gone:
            raise CancelledError(f"request {self._id} was cancelled")
        painting = {spec.name: self._inputs[spec.name] for spec in PAINTING_INPUTS if spec.name in self._inputs}
        began = time.monotonic()
        outputs = self._call("glm_dit", {**painting, **prior}, OUTPUTS, following)
        self._times.note(self._kind, time.monotonic() - began)
        return outputs

    def _call(
        self, model: str, inputs: Mapping[str, NDArray[Any]], outputs: Iterable[TensorSpec], following: StreamOptions
    ) -> Arrays:
        names = [spec.name for spec in outputs]
        answer = pb_utils.InferenceRequest(
            model_name=model,
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            requested_output_names=names,
            request_id=self._id,
            timeout=self._timeout_us,
            parameters=following.parameters(),
        ).exec()
        if answer.has_error():
            raise StageError(answer.error().message())
        return {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in names}

    def _follow(self) -> None:
        try:
            if self._done.wait(HOLD_SECONDS):
                return
            self._send(self._story.beginning())
            if self._bus is None:
                return
            with EventListener(self._bus, self._id) as listener:
                is_done = False
                while not is_done:
                    is_done = self._done.wait(EVENT_SECONDS)
                    if not is_done:
                        self._cancel_if_gone()
                    self._tell([event for event in listener.events(0) if self._story.is_about(event)])
        except Exception:  # the picture is made all the same
            logger.exception("the progress of request %s is not told", self._id)

    def _tell(self, told: list[Event]) -> None:
        """Sends every picture, and of the progress between them the latest."""
        latest: Event | None = None
        for event in told:
            if "preview" in event:
                tokens = PreviewTokens.read(event["preview"])
                preview = threading.Thread(target=self._preview, args=(event, tokens), name="preview", daemon=True)
                preview.start()
                self._previews.append(preview)
            elif "picture" in event:
                self._story.progress(event)
                self._send_picture(self._story.picture("denoise", event), unpacked_picture(event["picture"]))
                latest = None
            else:
                latest = self._story.progress(event) or latest
        if latest is not None:
            self._send(latest)

    def _preview(self, told: Event, tokens: PreviewTokens) -> None:
        assert self._bus is not None
        prompts = tuple(_string(self._inputs.get(name)) for name in ("prompt", "negative_prompt"))
        guidance = self._inputs.get("guidance_scale")
        scale = GenerationParameters("").guidance_scale if guidance is None else float(guidance[0])
        try:
            pixels = ask_preview(self._bus, self._id, tokens, (prompts[0], prompts[1]), scale, self._preview_steps)
        except Exception:  # the picture is made all the same
            logger.exception("request %s has no preview", self._id)
            return
        if pixels is not None:
            self._send_picture(self._story.picture("preview", told), pixels)

    def _cancel_if_gone(self) -> None:
        with self._lock:  # after its last response the sender may not be asked
            is_gone = not self._is_sent and bool(self._sender.is_cancelled())
        if is_gone and not self._is_gone:
            self._is_gone = True
            assert self._bus is not None
            control(self._bus, self._id, "cancel")

    def _send_picture(self, event: Event, pixels: NDArray[np.uint8]) -> None:
        file = base64.b64encode(images.encode(pixels, "png"))
        self._send(event, {"images_base64": np.array([file], dtype=np.object_)})

    def _send(self, event: Event, outputs: Mapping[str, NDArray[Any]] = NOTHING, *, is_last: bool = False) -> None:
        with self._lock:
            if self._is_sent:
                return
            event = {**event, "seconds": self._story.seconds()}  # responses of several threads, in the order of time
            made = response({"event": text_array(json.dumps(event)), **NOTHING, **outputs})
            self._is_sent = is_last
            self._sender.send(made, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)
            if is_last:
                self._sender = None  # see ``Responder``

    def _send_error(self, error: Any) -> None:
        made = pb_utils.InferenceResponse(error=error)
        with self._lock:
            if not self._is_sent:
                self._is_sent = True
                self._sender.send(made, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                self._sender = None


def _number(inputs: Inputs, name: str, default: int, high: int) -> int:
    value = inputs.integer(name)
    if value is None:
        return default
    check_range(name, value, 0, high)
    return value


def _timeout_of(parameters: str) -> int:
    """Microseconds; of ``generate_stream`` it is a parameter like any other."""
    timeout = json.loads(parameters or "{}").get("timeout")
    return timeout if type(timeout) is int and 0 < timeout < 2**63 else 0


def _string(array: NDArray[Any] | None) -> str:
    return "" if array is None else array[0].decode("utf-8")

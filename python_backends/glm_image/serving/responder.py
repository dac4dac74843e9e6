"""The answer to one request, sent exactly once, whatever happens on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.serving.errors import triton_error
from glm_image.serving.tensors import response

OnEnd = Callable[["BaseException | None"], None]
"""Takes what a request ended with; None = its outputs."""


class Responder:
    """Takes over a request's response sender.

    A request whose answer is never sent hangs its client and keeps the server from stopping, so every path must end in
    ``send`` or ``fail``; the first one counts.
    """

    def __init__(self, request: Any) -> None:
        self._sender: Any = request.get_response_sender()
        self._is_relayed = StreamOptions.is_asked(request.parameters())
        self._lock = threading.Lock()
        self._sent = False
        self._on_end: list[OnEnd] = []

    def when_ended(self, call: OnEnd) -> None:
        """Has ``call`` called just before the answer is sent."""
        self._on_end.append(call)

    def is_unwanted(self) -> bool:
        """Asks Triton whether the caller has gone away."""
        with self._lock:  # after its last response the sender may not be asked
            return not self._sent and bool(self._sender.is_cancelled())

    def send(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Answers with outputs; with an error when they cannot be sent."""
        try:
            made = response(values)
        except Exception as error:  # whatever it is, the client must get an answer
            self.fail(error)
            return
        self._finish(made, None)

    def fail(self, error: BaseException) -> None:
        """Answers with an error."""
        self._finish(pb_utils.InferenceResponse(error=triton_error(error, is_relayed=self._is_relayed)), error)

    def _finish(self, made: Any, error: BaseException | None) -> None:
        with self._lock:
            if self._sent:
                return
            self._sent = True
        for call in self._on_end:
            call(error)
        self._on_end.clear()
        self._sender.send(made, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self._sender = None  # one that is left to the end of the process outlives the memory that it is in

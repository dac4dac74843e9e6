"""The answer to one request, sent exactly once, whatever happens on the way."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.serving.errors import triton_error
from glm_image.serving.request_log import Entry
from glm_image.serving.tensors import response


class Answer:
    """Takes over a request's response sender; ``entry`` is its line in the log, written when it is answered.

    A request whose answer is never sent hangs its client and keeps the server from stopping, so every path must end in
    ``send`` or ``fail``; the first one counts.
    """

    def __init__(self, request: Any, entry: Entry) -> None:
        self.entry = entry
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._sent = False

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
        self._finish(pb_utils.InferenceResponse(error=triton_error(error)), error)

    def _finish(self, made: Any, error: BaseException | None) -> None:
        with self._lock:
            if self._sent:
                return
            self._sent = True
        self._sender.send(made, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.entry.end(error)

"""The response to a request, sent exactly once, and the responses of an instance that are still to be sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.errors import UnavailableError
from glm_image.lifecycle.context import RequestContext, RequestObserver
from glm_image.serving.errors import triton_error
from glm_image.serving.tensors import response

Result = TypeVar("Result")


def _ignore(error: BaseException | None) -> None:
    pass


class Responder:
    """Takes over a request's response sender.

    A request without a response hangs its client and keeps the server from stopping, so every path must end in
    ``send`` or ``fail``. Only the first call counts.

    Args:
        request: Triton's request.
        on_end: called with the request's error, or None, before the response is sent.
        is_relayed: see ``triton_error``.
    """

    def __init__(
        self, request: Any, on_end: Callable[[BaseException | None], None] = _ignore, *, is_relayed: bool = False
    ) -> None:
        self._sender: Any = request.get_response_sender()
        self._on_end, self.is_relayed = on_end, is_relayed
        self._lock = threading.RLock()  # which ``EventSender`` holds while it sends the last response

    def is_abandoned(self) -> bool:
        with self._lock:  # the sender must not be used after its last response
            return self._sender is not None and bool(self._sender.is_cancelled())

    def send(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Sends outputs, or an error if they cannot be sent."""
        with self.errors_sent():
            self._finish(response(outputs), None)

    def fail(self, error: BaseException) -> None:
        self._finish(pb_utils.InferenceResponse(error=triton_error(error, is_relayed=self.is_relayed)), error)

    def send_result(self, future: Future[Result], outputs: Callable[[Result], Mapping[str, NDArray[Any]]]) -> None:
        """Sends the outputs made of a future's result when it is resolved, or its error."""

        def respond(done: Future[Result]) -> None:
            with self.errors_sent():
                error = done.exception()
                if error is None:
                    self.send(outputs(done.result()))
                else:  # not raised: its traceback would refer to the request, which refers to the error
                    self.fail(error)

        future.add_done_callback(respond)

    @contextmanager
    def errors_sent(self) -> Iterator[None]:
        """Sends the exception that ends the block, whatever it is, as the response."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def _finish(self, made: Any, error: BaseException | None) -> None:
        with self._lock:
            # A sender that is kept to the end of the process outlives the memory that it uses.
            sender, self._sender = self._sender, None
        if sender is not None:
            self._on_end(error)
            self._on_end = _ignore  # it leads to the request's context, and that back here
            sender.send(made, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class PendingResponses(RequestObserver):
    """The responses of an instance that are still to be sent."""

    def __init__(self) -> None:
        self._responders: dict[RequestContext, Responder] = {}

    def add(self, context: RequestContext, responder: Responder) -> None:
        self._responders[context] = responder

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        self._responders.pop(context, None)

    def fail_all(self, error: UnavailableError) -> None:
        for responder in list(self._responders.values()):
            responder.fail(error)

"""The client: a prompt in, pictures out."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from glm_image_client import calls
from glm_image_client.calls import ENSEMBLE, Call, described
from glm_image_client.connections import connect
from glm_image_client.errors import GlmImageClientError, RequestTimeout
from glm_image_client.events import StreamEvent, check_whole
from glm_image_client.retries import NO_RETRIES, Attempts, Retries
from glm_image_client.transport import Endpoint, ProtocolName, microseconds

READY_SECONDS: Final = 5.0
GIVE_UP_SECONDS: Final = 2.0
"""What a caller who no longer wants an answer still waits for the server to hear of it."""

P = ParamSpec("P")
T = TypeVar("T")


def _method(prepare: Callable[P, Call[T]]) -> Callable[Concatenate[GlmImageClient, P], T]:
    def method(self: GlmImageClient, /, *arguments: P.args, **named: P.kwargs) -> T:
        return self._answer(prepare(*arguments, **named))

    return described(method, prepare)


class GlmImageClient:
    """Talks to a GLM-Image server; a context manager, safe to use from several threads.

    A call that is interrupted, or whose time runs out, cancels its request at the server.

    Args:
        url: ``HOST[:PORT]``, or ``SCHEME://HOST[:PORT]`` with grpc, grpcs, http or https, which decides the protocol;
            None = 127.0.0.1:8001 (gRPC) or 127.0.0.1:8000 (HTTP).
        protocol: ``grpc`` or ``http``.
        timeout: seconds to wait for an answer where a call does not say; None = as long as it takes.
        retries: whether and when a request is sent again; by default it never is.

    Raises:
        BadArgumentError: an argument is none of these.
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: ProtocolName = "grpc",
        *,
        timeout: float | None = None,
        retries: Retries = NO_RETRIES,
    ) -> None:
        microseconds(timeout)
        self.endpoint = Endpoint.parse(url, protocol)
        self._timeout = timeout
        self._retries = retries
        self._transport = connect(self.endpoint)

    def __enter__(self) -> GlmImageClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    def server_ready(self) -> bool:
        """Tells whether the server answers and every model is ready; False where no server is."""
        return self._transport.ready(self._timeout or READY_SECONDS)

    def model_metadata(self, model: str = ENSEMBLE) -> dict[str, Any]:
        """Returns KServe's metadata of a model: name, versions, platform, inputs and outputs.

        Raises:
            GlmImageClientError: as ``generate``.
        """
        return self._transport.model_metadata(model, self._timeout)

    generate = _method(calls.generate)
    prior_tokens = _method(calls.prior_tokens)
    paint = _method(calls.paint)
    cancel = _method(calls.cancel)
    status = _method(calls.status)

    def stream(self, prompt: str, **named: Any) -> Generator[StreamEvent, None, None]:
        """See ``glm_image_client.calls.stream``."""
        return self._events(calls.stream(prompt, **named))

    def _events(self, call: Call[StreamEvent]) -> Generator[StreamEvent, None, None]:
        timeout = self._timeout if call.timeout is None else call.timeout
        event = None
        # Closed as soon as nobody iterates any more: that cancels the request.
        with closing(
            self._transport.stream(call.model, call.tensors, request_id=call.request_id or "", timeout=timeout)
        ) as responses:
            for outputs in responses:
                event = call.read(outputs)
                yield event
        check_whole(event)

    def _answer(self, call: Call[T]) -> T:
        try:
            return self._answer_of(call)
        except (KeyboardInterrupt, RequestTimeout):
            self._give_up(call)
            raise

    def _give_up(self, call: Call[Any]) -> None:
        # Nobody waits for it any more, and Triton does not tell a running step of an ensemble.
        if call.request_id is not None:
            with suppress(GlmImageClientError):
                self.cancel(call.request_id, timeout=GIVE_UP_SECONDS)

    def _answer_of(self, call: Call[T]) -> T:
        attempts = Attempts(self._retries, self._timeout if call.timeout is None else call.timeout)
        while True:
            try:
                outputs = self._transport.infer(
                    call.model, call.tensors, request_id=call.request_id or "", timeout=attempts.timeout
                )
            except GlmImageClientError as error:
                time.sleep(attempts.pause_after(error))
            else:
                return call.read(outputs)

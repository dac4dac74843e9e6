"""The two clients: the blocking one and the one for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

from glm_image_client import calls
from glm_image_client.core import AsyncClientCore, ClientCore, run
from glm_image_client.events import StreamEvent
from glm_image_client.result import GenerationResult, PriorTokens
from glm_image_client.retries import NO_RETRIES, Retries
from glm_image_client.transport import KEEPALIVE_SECONDS, Endpoint, ProtocolName

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from glm_image_client.options import GenerateOptions, PaintOptions, PriorOptions, StreamOptions


class GlmImageClient:
    """Talks to a GLM-Image server; a context manager, safe to use from several threads.

    A call that is interrupted or times out cancels its request on the server. Every call raises the errors of
    ``generate``.

    Args:
        url: ``HOST[:PORT]``, or ``SCHEME://HOST[:PORT]`` with grpc, grpcs, http or https, which decides the protocol;
            None = 127.0.0.1:8001 (gRPC) or 127.0.0.1:8000 (HTTP).
        protocol: of a URL without a scheme.
        timeout: seconds to wait for an answer where a call does not say; None = no limit.
        retries: when a request is sent again; by default never.
        keepalive: seconds between two pings over gRPC while a call waits, so that no NAT or load balancer drops the
            connection; None = no pings. A server that permits fewer of them is sent none, and the request again.

    Raises:
        BadArgumentError: an argument is not allowed.
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: ProtocolName = "grpc",
        *,
        timeout: float | None = None,
        retries: Retries = NO_RETRIES,
        keepalive: float | None = KEEPALIVE_SECONDS,
    ) -> None:
        self.endpoint = Endpoint.parse(url, protocol)
        self._core = ClientCore(self.endpoint, timeout, retries, keepalive)

    def __enter__(self) -> GlmImageClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        run(self._core.close())

    def server_ready(self) -> bool:
        """Returns whether the server answers and every model is ready; False if no server answers."""
        return run(self._core.ready())

    def model_metadata(self, model: str = calls.ENSEMBLE) -> dict[str, Any]:
        """Returns KServe's metadata of a model: name, versions, platform, inputs and outputs."""
        return run(self._core.model_metadata(model))

    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> GenerationResult:
        """Generates images.

        Args:
            prompt: text to render; text in quotation marks becomes lettering in the image.
            options: see ``GenerateOptions``; an option that is omitted or None has the server's default.

        Raises:
            BadArgumentError: a value cannot be sent; no request was sent.
            RefusedError: the server refuses the request.
            UnreachableError: no server answers, or the connection broke.
            BusyError: the server's queue is full, or the server is stopping.
            RequestTimeout: the timeout expired, or is too short for the request.
            RequestCancelled: the request was cancelled.
            ServerFailure: the server failed.
        """
        return run(self._core.answer(calls.generate, prompt, **options))

    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> Generator[StreamEvent, None, None]:
        """Generates images as ``generate`` does, and yields a ``StreamEvent`` for each step of the progress.

        Options that are not allowed are refused by the call. Leaving the iteration cancels the request; the server's
        errors are raised by the iteration. A stream is never retried.

        Args:
            prompt: as in ``generate``.
            options: see ``StreamOptions``; over HTTP ``output_format`` may not be ``raw``.
        """
        call = calls.stream(prompt, **options)
        return _iterate(self._core.events(lambda: call))

    def prior_tokens(self, prompt: str, **options: Unpack[PriorOptions]) -> PriorTokens:
        """Runs the AR stage alone; its tokens are the input of ``paint``.

        Args:
            prompt: as in ``generate``.
            options: see ``PriorOptions``.
        """
        return run(self._core.answer(calls.prior_tokens, prompt, **options))

    def paint(self, prompt: str, prior: PriorTokens, **options: Unpack[PaintOptions]) -> GenerationResult:
        """Runs the DiT stage alone on tokens that were kept, perhaps edited.

        Args:
            prompt: only its quoted text matters.
            prior: the tokens; one image for each row of ``prior_token_ids``.
            options: see ``PaintOptions``; ``seed`` is that of the noise, by default the seed of ``prior``, and
                ``images`` are the source images that ``prior`` was made with.
        """
        return run(self._core.answer(calls.paint, prompt, prior, **options))

    def cancel(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """Cancels every running or queued request of an id; ``timeout`` is in seconds.

        Returns the server's answer: ``state`` is ``cancelled``, ``already_cancelled``, ``finished``, ``failed`` or
        ``unknown``, ``cancelled`` the number of requests that this call cancelled, ``requests`` where each of them was.
        """
        return run(self._core.answer(calls.control, "cancel", request_id, timeout))

    def status(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """Returns the state of the requests of an id; ``timeout`` is in seconds.

        In the server's answer ``state`` is ``queued``, ``running``, ``cancelled``, ``finished``, ``failed`` or
        ``unknown``, ``requests`` has the stage and the progress of each.
        """
        return run(self._core.answer(calls.control, "status", request_id, timeout))


class AsyncGlmImageClient:
    """Talks to a GLM-Image server from one asyncio loop; an asynchronous context manager.

    Many requests may be in flight concurrently. A call that is cancelled or times out cancels its request on the
    server. Methods, arguments and errors are those of ``GlmImageClient``.
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: ProtocolName = "grpc",
        *,
        timeout: float | None = None,
        retries: Retries = NO_RETRIES,
        keepalive: float | None = KEEPALIVE_SECONDS,
    ) -> None:
        self.endpoint = Endpoint.parse(url, protocol)
        self._core = AsyncClientCore(self.endpoint, timeout, retries, keepalive)

    async def __aenter__(self) -> AsyncGlmImageClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See ``GlmImageClient.close``."""
        await self._core.close()

    async def server_ready(self) -> bool:
        """See ``GlmImageClient.server_ready``."""
        return await self._core.ready()

    async def model_metadata(self, model: str = calls.ENSEMBLE) -> dict[str, Any]:
        """See ``GlmImageClient.model_metadata``."""
        return await self._core.model_metadata(model)

    async def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> GenerationResult:
        """See ``GlmImageClient.generate``."""
        return await self._core.answer(calls.generate, prompt, **options)

    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> AsyncGenerator[StreamEvent, None]:
        """See ``GlmImageClient.stream``; returns an asynchronous iterator."""
        return self._core.events(calls.stream, prompt, **options)

    async def prior_tokens(self, prompt: str, **options: Unpack[PriorOptions]) -> PriorTokens:
        """See ``GlmImageClient.prior_tokens``."""
        return await self._core.answer(calls.prior_tokens, prompt, **options)

    async def paint(self, prompt: str, prior: PriorTokens, **options: Unpack[PaintOptions]) -> GenerationResult:
        """See ``GlmImageClient.paint``."""
        return await self._core.answer(calls.paint, prompt, prior, **options)

    async def cancel(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """See ``GlmImageClient.cancel``."""
        return await self._core.answer(calls.control, "cancel", request_id, timeout)

    async def status(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """See ``GlmImageClient.status``."""
        return await self._core.answer(calls.control, "status", request_id, timeout)


def _iterate(events: AsyncGenerator[StreamEvent, None]) -> Generator[StreamEvent, None, None]:
    try:
        while True:
            try:
                event = run(anext(events))
            except StopAsyncIteration:
                return
            yield event
    finally:
        run(events.aclose())

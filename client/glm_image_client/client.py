"""The two clients: the blocking one and the one for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any, ClassVar, overload

from glm_image_client import calls
from glm_image_client.core import AsyncClientCore, ClientCore, run
from glm_image_client.events import StreamEvent
from glm_image_client.options import GenerateOptions, PaintOptions, PriorOptions, StreamOptions
from glm_image_client.result import GenerationResult, PriorTokens
from glm_image_client.retries import NO_RETRIES, Retries
from glm_image_client.signatures import documented_by, with_options
from glm_image_client.transport import KEEPALIVE_SECONDS, Endpoint, ProtocolName

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompts = list[str] | tuple[str, ...]


class _Client:
    """The constructor of both clients."""

    _core_class: ClassVar[type[ClientCore]]

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
        self._core = self._core_class.connected(self.endpoint, timeout, retries, keepalive)


class GlmImageClient(_Client):
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

    _core_class = ClientCore

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
        """Returns KServe's metadata of a model: name, versions, platform, inputs and outputs.

        Args:
            model: the name of a model.
        """
        return run(self._core.model_metadata(model))

    @overload
    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> GenerationResult: ...
    @overload
    def generate(self, prompt: Prompts, **options: Unpack[GenerateOptions]) -> list[GenerationResult]: ...
    @with_options(GenerateOptions)
    def generate(
        self, prompt: str | Prompts, **options: Unpack[GenerateOptions]
    ) -> GenerationResult | list[GenerationResult]:
        """Generates images.

        An option that is omitted or None has the server's default. A list of prompts is sent as one request for each
        prompt, with the same options and up to eight of them together; their ids are ``request_id`` and ``-0``,
        ``-1``, ...

        Args:
            prompt: text to render; text in quotation marks becomes lettering in the image. Or a list of prompts.
            options: see ``GenerateOptions``.

        Returns:
            The result, for a list of prompts the list of their results.

        Raises:
            BadArgumentError: a value cannot be sent; no request was sent.
            PromptsError: some of a list of prompts failed; the error has the results of the others.
            RefusedError: the server refuses the request.
            UnreachableError: no server answers, or the connection broke.
            BusyError: the server's queue is full, or the server is stopping.
            RequestTimeout: the timeout expired, or is too short for the request.
            RequestCancelled: the request was cancelled.
            ServerFailure: the server failed.
        """
        if isinstance(prompt, (list, tuple)):
            return run(self._core.answers(calls.of_prompts(prompt, options)))
        return run(self._core.answer(calls.generate, prompt, **options))

    @with_options(StreamOptions)
    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> Generator[StreamEvent, None, None]:
        """Generates images as ``generate`` does, and yields a ``StreamEvent`` for each step of the progress.

        Values that cannot be sent are refused by the call. Leaving the iteration cancels the request. A stream is never
        retried. Over HTTP ``output_format`` may not be ``raw``. An option that is omitted or None has the server's
        default.

        Args:
            prompt: text to render; text in quotation marks becomes lettering in the image.
            options: see ``StreamOptions``.

        Returns:
            An iterator over the events; the last one has the ``result``. It raises the server's errors, which are those
            of ``generate``.
        """
        call = calls.stream(prompt, **options)
        return _iterate(self._core.events(lambda: call))

    @with_options(PriorOptions)
    def prior_tokens(self, prompt: str, **options: Unpack[PriorOptions]) -> PriorTokens:
        """Runs the AR stage alone; its tokens are the input of ``paint``.

        An option that is omitted or None has the server's default. Raises the errors of ``generate``.

        Args:
            prompt: text to render; text in quotation marks becomes lettering in the image.
            options: see ``PriorOptions``.
        """
        return run(self._core.answer(calls.prior_tokens, prompt, **options))

    @with_options(PaintOptions)
    def paint(self, prompt: str, prior: PriorTokens, **options: Unpack[PaintOptions]) -> GenerationResult:
        """Runs the DiT stage alone on tokens that were kept, perhaps edited.

        ``seed`` is that of the noise, by default the seed of ``prior``; ``images`` are the source images that ``prior``
        was made with. Another option that is omitted or None has the server's default. Raises the errors of
        ``generate``.

        Args:
            prompt: only its quoted text matters.
            prior: the tokens; one image for each row of ``prior_token_ids``.
            options: see ``PaintOptions``.
        """
        return run(self._core.answer(calls.paint, prompt, prior, **options))

    def cancel(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """Cancels every running or queued request of an id, of whichever client.

        Args:
            request_id: the id that the requests were sent with.
            timeout: seconds to wait for the answer; None = no limit.

        Returns:
            The server's answer: ``state`` is ``cancelled``, ``already_cancelled``, ``finished``, ``failed`` or
            ``unknown``, ``cancelled`` the number of requests that this call cancelled, ``requests`` where each of them
            was.
        """
        return run(self._core.answer(calls.control, "cancel", request_id, timeout))

    def status(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """Returns the state of the requests of an id.

        Args:
            request_id: the id that the requests were sent with.
            timeout: seconds to wait for the answer; None = no limit.

        Returns:
            The server's answer: ``state`` is ``queued``, ``running``, ``cancelled``, ``finished``, ``failed`` or
            ``unknown``, ``requests`` has the stage and the progress of each.
        """
        return run(self._core.answer(calls.control, "status", request_id, timeout))

    def defaults(self, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """Returns the options that suit the server's checkpoint: ``width``, ``height``, ``num_inference_steps``, ...

        They are recommendations: the server itself takes 1024x1024 and 50 steps where a request does not say.

        Args:
            timeout: seconds to wait for the answer; None = no limit.
        """
        return run(self._core.answer(calls.defaults, timeout))


class AsyncGlmImageClient(_Client):
    """Talks to a GLM-Image server from one asyncio loop; an asynchronous context manager.

    Many requests may be in flight concurrently. A call that is cancelled or times out cancels its request on the
    server. Methods, arguments and errors are those of ``GlmImageClient``.

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

    _core_class = AsyncClientCore

    async def __aenter__(self) -> AsyncGlmImageClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @documented_by(GlmImageClient.close)
    async def close(self) -> None:
        """See ``GlmImageClient.close``."""
        await self._core.close()

    @documented_by(GlmImageClient.server_ready)
    async def server_ready(self) -> bool:
        """See ``GlmImageClient.server_ready``."""
        return await self._core.ready()

    @documented_by(GlmImageClient.model_metadata)
    async def model_metadata(self, model: str = calls.ENSEMBLE) -> dict[str, Any]:
        """See ``GlmImageClient.model_metadata``."""
        return await self._core.model_metadata(model)

    @overload
    async def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> GenerationResult: ...
    @overload
    async def generate(self, prompt: Prompts, **options: Unpack[GenerateOptions]) -> list[GenerationResult]: ...
    @documented_by(GlmImageClient.generate)
    async def generate(
        self, prompt: str | Prompts, **options: Unpack[GenerateOptions]
    ) -> GenerationResult | list[GenerationResult]:
        """See ``GlmImageClient.generate``."""
        if isinstance(prompt, (list, tuple)):
            return await self._core.answers(calls.of_prompts(prompt, options))
        return await self._core.answer(calls.generate, prompt, **options)

    @documented_by(GlmImageClient.stream)
    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> AsyncGenerator[StreamEvent, None]:
        """See ``GlmImageClient.stream``; returns an asynchronous iterator."""
        return self._core.events(calls.stream, prompt, **options)

    @documented_by(GlmImageClient.prior_tokens)
    async def prior_tokens(self, prompt: str, **options: Unpack[PriorOptions]) -> PriorTokens:
        """See ``GlmImageClient.prior_tokens``."""
        return await self._core.answer(calls.prior_tokens, prompt, **options)

    @documented_by(GlmImageClient.paint)
    async def paint(self, prompt: str, prior: PriorTokens, **options: Unpack[PaintOptions]) -> GenerationResult:
        """See ``GlmImageClient.paint``."""
        return await self._core.answer(calls.paint, prompt, prior, **options)

    @documented_by(GlmImageClient.cancel)
    async def cancel(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """See ``GlmImageClient.cancel``."""
        return await self._core.answer(calls.control, "cancel", request_id, timeout)

    @documented_by(GlmImageClient.status)
    async def status(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """See ``GlmImageClient.status``."""
        return await self._core.answer(calls.control, "status", request_id, timeout)

    @documented_by(GlmImageClient.defaults)
    async def defaults(self, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """See ``GlmImageClient.defaults``."""
        return await self._core.answer(calls.defaults, timeout)


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

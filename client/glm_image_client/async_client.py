"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from glm_image_client import calls
from glm_image_client.connections import connect_async
from glm_image_client.core import AsyncRuntime, ClientCore
from glm_image_client.events import StreamEvent
from glm_image_client.result import GenerationResult, PriorTokens
from glm_image_client.retries import NO_RETRIES, Retries
from glm_image_client.transport import Endpoint, ProtocolName

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from glm_image_client.options import GenerateOptions, PaintOptions, PriorOptions, StreamOptions


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
    ) -> None:
        self.endpoint = Endpoint.parse(url, protocol)
        self._core = ClientCore(self.endpoint, connect_async, AsyncRuntime(), timeout, retries)

    async def __aenter__(self) -> AsyncGlmImageClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        return await self._core.answer(partial(calls.generate, prompt, **options))

    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> AsyncGenerator[StreamEvent, None]:
        """See ``GlmImageClient.stream``; returns an asynchronous iterator."""
        return self._core.events(partial(calls.stream, prompt, **options))

    async def prior_tokens(self, prompt: str, **options: Unpack[PriorOptions]) -> PriorTokens:
        """See ``GlmImageClient.prior_tokens``."""
        return await self._core.answer(partial(calls.prior_tokens, prompt, **options))

    async def paint(self, prompt: str, prior: PriorTokens, **options: Unpack[PaintOptions]) -> GenerationResult:
        """See ``GlmImageClient.paint``."""
        return await self._core.answer(partial(calls.paint, prompt, prior, **options))

    async def cancel(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """See ``GlmImageClient.cancel``."""
        return await self._core.answer(partial(calls.cancel, request_id, timeout=timeout))

    async def status(self, request_id: str, *, timeout: float | None = calls.CONTROL_SECONDS) -> dict[str, Any]:
        """See ``GlmImageClient.status``."""
        return await self._core.answer(partial(calls.status, request_id, timeout=timeout))

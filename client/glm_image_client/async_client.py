"""The same client for programs that run on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from glm_image_client import calls
from glm_image_client.calls import ENSEMBLE, Call, described
from glm_image_client.client import GIVE_UP_SECONDS, READY_SECONDS
from glm_image_client.connections import connect_async
from glm_image_client.errors import GlmImageClientError, RequestTimeout
from glm_image_client.events import StreamEvent, check_whole
from glm_image_client.retries import NO_RETRIES, Attempts, Retries
from glm_image_client.transport import Endpoint, ProtocolName, microseconds

P = ParamSpec("P")
T = TypeVar("T")


def _method(prepare: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncGlmImageClient, P], Awaitable[T]]:
    async def method(self: AsyncGlmImageClient, /, *arguments: P.args, **named: P.kwargs) -> T:
        # Source images are read and encoded here, which may take a while: not in the loop's own thread.
        return await self._answer(await asyncio.to_thread(prepare, *arguments, **named))

    return described(method, prepare)


class AsyncGlmImageClient:
    """Talks to a GLM-Image server from one asyncio loop; an asynchronous context manager.

    Many requests may be in flight at once. A call that is cancelled, or whose time runs out, cancels its request at the
    server. Arguments and errors are those of ``GlmImageClient``.
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
        self._transport = connect_async(self.endpoint)

    async def __aenter__(self) -> AsyncGlmImageClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection."""
        await self._transport.close()

    async def server_ready(self) -> bool:
        """See ``GlmImageClient.server_ready``."""
        return await self._transport.ready(self._timeout or READY_SECONDS)

    async def model_metadata(self, model: str = ENSEMBLE) -> dict[str, Any]:
        """See ``GlmImageClient.model_metadata``."""
        return await self._transport.model_metadata(model, self._timeout)

    generate = _method(calls.generate)
    prior_tokens = _method(calls.prior_tokens)
    paint = _method(calls.paint)
    cancel = _method(calls.cancel)
    status = _method(calls.status)

    async def stream(self, prompt: str, **named: Any) -> AsyncGenerator[StreamEvent, None]:
        """See ``glm_image_client.calls.stream``; an asynchronous iterator."""
        call = await asyncio.to_thread(partial(calls.stream, prompt, **named))
        timeout = self._timeout if call.timeout is None else call.timeout
        event = None
        async with aclosing(
            self._transport.stream(call.model, call.tensors, request_id=call.request_id or "", timeout=timeout)
        ) as responses:
            async for outputs in responses:
                event = call.read(outputs)
                yield event
        check_whole(event)

    async def _answer(self, call: Call[T]) -> T:
        try:
            return await self._answer_of(call)
        except (asyncio.CancelledError, KeyboardInterrupt, RequestTimeout):
            await self._give_up(call)
            raise

    async def _give_up(self, call: Call[Any]) -> None:
        if call.request_id is not None:
            with suppress(GlmImageClientError):
                await asyncio.shield(self.cancel(call.request_id, timeout=GIVE_UP_SECONDS))

    async def _answer_of(self, call: Call[T]) -> T:
        attempts = Attempts(self._retries, self._timeout if call.timeout is None else call.timeout)
        while True:
            try:
                outputs = await self._transport.infer(
                    call.model, call.tensors, request_id=call.request_id or "", timeout=attempts.timeout
                )
            except GlmImageClientError as error:
                await asyncio.sleep(attempts.pause_after(error))
            else:
                return call.read(outputs)

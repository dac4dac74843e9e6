"""The client's logic, written once for both clients as coroutines.

``AsyncGlmImageClient`` awaits them. ``GlmImageClient`` runs them with ``run``: its core and its transport block instead
of suspending, so no event loop is involved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, ClassVar, Final, ParamSpec, TypeVar, cast

from glm_image_client import calls
from glm_image_client.calls import Call
from glm_image_client.errors import GlmImageClientError, RequestTimeout, ServerFailure, TooManyPingsError
from glm_image_client.events import StreamEvent
from glm_image_client.retries import NO_RETRIES, Attempts, Retries
from glm_image_client.transport import Endpoint, check_keepalive, connect, microseconds

READY_SECONDS: Final = 5.0
GIVE_UP_SECONDS: Final = 2.0
"""Longest wait for the server to acknowledge the cancellation of an abandoned request."""

P = ParamSpec("P")
T = TypeVar("T")


def run(awaitable: Awaitable[T]) -> T:
    """Returns the result of a coroutine that never suspends."""
    try:
        awaitable.__await__().send(None)
    except StopIteration as finished:
        return cast("T", finished.value)
    raise RuntimeError("a blocking call has suspended")


class ClientCore:
    """Sends calls, retries them, and cancels those that are abandoned. Waiting blocks the calling thread.

    The arguments are those of ``GlmImageClient``.
    """

    asynchronous: ClassVar = False

    def __init__(self, endpoint: Endpoint, timeout: float | None, retries: Retries, keepalive: float | None) -> None:
        microseconds(timeout)  # refuses what is not a positive number
        check_keepalive(keepalive)
        self._timeout, self._retries = timeout, retries
        self._transport = connect(endpoint, asynchronous=self.asynchronous, keepalive=keepalive)

    async def close(self) -> None:
        await self._transport.close()

    async def ready(self) -> bool:
        return await self._transport.ready(self._timeout or READY_SECONDS)

    async def model_metadata(self, model: str) -> dict[str, Any]:
        return await self._transport.model_metadata(model, self._timeout)

    async def answer(self, prepare: Callable[P, Call[T]], *args: P.args, **options: P.kwargs) -> T:
        """Sends the call that ``prepare`` returns, and returns its result.

        ``prepare`` reads and encodes source images, which may take a while.
        """
        call = await self._in_thread(prepare, *args, **options)
        try:
            return await self._attempts(call)
        except (asyncio.CancelledError, KeyboardInterrupt, RequestTimeout):
            await self._cancel(call)
            raise

    async def events(
        self, prepare: Callable[P, Call[StreamEvent]], *args: P.args, **options: P.kwargs
    ) -> AsyncGenerator[StreamEvent, None]:
        """Sends the call of a stream and yields its events; closing the generator cancels the request.

        The events begin anew after a connection that was closed for its pings.
        """
        call = await self._in_thread(prepare, *args, **options)
        attempts = self._attempts_of(call, NO_RETRIES)
        event, is_done = None, False
        while not is_done:
            try:
                async with aclosing(self._transport.stream(call, attempts.timeout)) as responses:
                    async for outputs in responses:
                        event = call.read(outputs)
                        yield event
                is_done = True
            except TooManyPingsError as error:
                attempts.repeat_without_pings(error)
        if event is None or event.result is None:
            raise ServerFailure("the server ended the stream before it sent the images")

    async def _attempts(self, call: Call[T]) -> T:
        attempts = self._attempts_of(call, self._retries)
        while True:
            try:
                outputs = await self._transport.infer(call, attempts.timeout)
            except TooManyPingsError as error:
                attempts.repeat_without_pings(error)
                await self._cancel(call)
            except GlmImageClientError as error:
                await self._sleep(attempts.pause_after(error))
            else:
                return call.read(outputs)

    def _attempts_of(self, call: Call[T], retries: Retries) -> Attempts:
        return Attempts(retries, self._timeout if call.timeout is None else call.timeout)

    async def _cancel(self, call: Call[T]) -> None:
        """Cancels a request: Triton does not propagate a disconnect to a running step of an ensemble."""
        if call.request_id:
            cancel = calls.control("cancel", call.request_id, GIVE_UP_SECONDS)
            with suppress(GlmImageClientError):
                await self._shielded(self._attempts(cancel))

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return function(*args, **options)

    async def _shielded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await coroutine


class AsyncClientCore(ClientCore):
    """Suspends to the running loop. Calls are made in a thread, and cancellations complete in any case."""

    asynchronous = True

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.to_thread(function, *args, **options)

    async def _shielded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(coroutine)

"""The client's logic, written once for both clients as coroutines.

``AsyncGlmImageClient`` awaits them. ``GlmImageClient`` runs them with ``run``: its core and its transport block instead
of suspending, so no event loop is involved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from itertools import islice
from typing import Any, ClassVar, Final, ParamSpec, TypeVar, cast

from glm_image_client import calls
from glm_image_client.calls import Call
from glm_image_client.errors import (
    BadArgumentError,
    GlmImageClientError,
    PromptsError,
    RequestTimeout,
    ServerFailure,
    TooManyPingsError,
)
from glm_image_client.events import StreamEvent
from glm_image_client.retries import NO_RETRIES, Attempts, Retries
from glm_image_client.transport import Endpoint, Transport, check_keepalive, connect, microseconds

READY_SECONDS: Final = 5.0
CONCURRENT_CALLS: Final = 8
"""Requests of a list of prompts that are in flight together: as many as the first stage decodes by default."""

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
    """Sends calls, retries them, and cancels those that are abandoned. Waiting blocks the calling thread."""

    asynchronous: ClassVar = False

    def __init__(self, transport: Transport, timeout: float | None = None, retries: Retries = NO_RETRIES) -> None:
        self._timeout, self._retries = timeout, retries
        self._open_transport = transport
        self._is_closed = False

    @classmethod
    def connected(
        cls, endpoint: Endpoint, timeout: float | None, retries: Retries, keepalive: float | None
    ) -> ClientCore:
        """Returns a core over a connection; the arguments are those of ``GlmImageClient``."""
        microseconds(timeout)  # refuses what is not a positive number
        check_keepalive(keepalive)
        return cls(connect(endpoint, asynchronous=cls.asynchronous, keepalive=keepalive), timeout, retries)

    @property
    def _transport(self) -> Transport:
        if self._is_closed:
            raise BadArgumentError("the client is closed; make a new one")
        return self._open_transport

    async def close(self) -> None:
        """Closes the connection; later calls are refused."""
        self._is_closed = True
        await self._open_transport.close()

    async def ready(self) -> bool:
        return await self._transport.ready(READY_SECONDS if self._timeout is None else self._timeout)

    async def model_metadata(self, model: str) -> dict[str, Any]:
        if not isinstance(model, str) or not model:
            raise BadArgumentError(f"model is {model!r}; allowed: the name of a model")
        return await self._transport.model_metadata(model, self._timeout)

    async def answer(self, prepare: Callable[P, Call[T]], *args: P.args, **options: P.kwargs) -> T:
        """Sends the call that ``prepare`` returns, and returns its result.

        ``prepare`` reads and encodes source images, which may take a while.
        """
        call = await self._in_thread(prepare, *args, **options)
        try:
            return await self._attempts(call)
        except (asyncio.CancelledError, KeyboardInterrupt, RequestTimeout):
            await self._cancel(call.request_id)
            raise

    async def _cancel(self, request_id: str) -> None:
        """Cancels a request: Triton does not propagate a disconnect to a running step of an ensemble."""
        if not request_id:
            return
        cancel = calls.control("cancel", request_id, GIVE_UP_SECONDS)
        with suppress(GlmImageClientError):
            await self._shielded(self._attempts(cancel))

    async def answers(self, prepared: Mapping[str, Callable[[], Call[T]]]) -> list[T]:
        """Sends several calls, ``CONCURRENT_CALLS`` of them together, and returns their results in the same order.

        Args:
            prepared: for the request id of each call the function that makes it.

        Raises:
            BadArgumentError: the first call cannot be made; none was sent.
            PromptsError: some calls failed.
        """
        for prepare in islice(prepared.values(), 1):
            await self._in_thread(prepare)
        results = await self._together({own: self._outcome(prepare) for own, prepare in prepared.items()})
        errors = [result for result in results if isinstance(result, GlmImageClientError)]
        if errors:
            raise PromptsError(results) from errors[0]
        return cast("list[T]", results)

    async def _outcome(self, prepare: Callable[[], Call[Any]]) -> object:
        try:
            return await self.answer(prepare)
        except GlmImageClientError as error:
            return error

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
                await self._cancel(call.request_id)
            except GlmImageClientError as error:
                await self._sleep(attempts.pause_after(error))
            else:
                return call.read(outputs)

    def _attempts_of(self, call: Call[T], retries: Retries) -> Attempts:
        return Attempts(retries, self._timeout if call.timeout is None else call.timeout)

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return function(*args, **options)

    async def _shielded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await coroutine

    async def _together(self, coroutines: Mapping[str, Coroutine[Any, Any, T]]) -> list[T]:
        with ThreadPoolExecutor(CONCURRENT_CALLS, thread_name_prefix="glm-image") as pool:
            futures = {request_id: pool.submit(run, coroutine) for request_id, coroutine in coroutines.items()}
            try:
                return [future.result() for future in futures.values()]
            except BaseException:  # an interrupt, which only this thread receives
                for request_id, future in futures.items():
                    if future.cancel():
                        coroutines[request_id].close()
                    elif not future.done():
                        await self._cancel(request_id)
                raise


class AsyncClientCore(ClientCore):
    """Suspends to the running loop. Calls are made in a thread, and cancellations complete in any case."""

    asynchronous = True

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.to_thread(function, *args, **options)

    async def _shielded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(coroutine)

    async def _together(self, coroutines: Mapping[str, Coroutine[Any, Any, T]]) -> list[T]:
        places = asyncio.Semaphore(CONCURRENT_CALLS)

        async def placed(coroutine: Coroutine[Any, Any, T]) -> T:
            try:
                async with places:
                    return await coroutine
            finally:
                coroutine.close()  # it may have been cancelled before it began

        results = await asyncio.gather(*map(placed, coroutines.values()), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, GlmImageClientError):
                raise result
        return cast("list[T]", results)

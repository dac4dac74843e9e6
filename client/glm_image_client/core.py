"""The client's logic, written once for both clients as coroutines.

``AsyncGlmImageClient`` awaits them. ``GlmImageClient`` runs them with ``run``, on a transport and a ``Runtime`` that
block instead of suspending, so no event loop is involved.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Final, Protocol, TypeVar, cast

from glm_image_client import calls
from glm_image_client.calls import Call
from glm_image_client.errors import GlmImageClientError, RequestTimeout
from glm_image_client.events import StreamEvent, check_complete
from glm_image_client.retries import Attempts, Retries
from glm_image_client.transport import Endpoint, Transport, microseconds

READY_SECONDS: Final = 5.0
GIVE_UP_SECONDS: Final = 2.0
"""Longest wait for the server to acknowledge the cancellation of an abandoned request."""

T = TypeVar("T")


class Runtime(Protocol):
    """What the logic needs besides a transport."""

    async def sleep(self, seconds: float) -> None:
        """Waits."""

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Calls a function that may take a while."""

    async def shielded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Awaits a coroutine to its end, even if the caller is cancelled."""


class BlockingRuntime:
    """Blocks the calling thread."""

    async def sleep(self, seconds: float) -> None:
        """See ``Runtime``."""
        time.sleep(seconds)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """See ``Runtime``."""
        return function()

    async def shielded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """See ``Runtime``."""
        return await coroutine


class AsyncRuntime:
    """Suspends to the running loop."""

    async def sleep(self, seconds: float) -> None:
        """See ``Runtime``."""
        await asyncio.sleep(seconds)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """See ``Runtime``."""
        return await asyncio.to_thread(function)

    async def shielded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """See ``Runtime``."""
        return await asyncio.shield(coroutine)


def run(awaitable: Awaitable[T]) -> T:
    """Returns the result of a coroutine that never suspends."""
    try:
        awaitable.__await__().send(None)
    except StopIteration as finished:
        return cast("T", finished.value)
    raise RuntimeError("a blocking call has suspended")


async def finished(value: T | Awaitable[T]) -> T:
    """Returns a value, or awaits it: the same call gives one or the other in the two halves of tritonclient."""
    return await value if inspect.isawaitable(value) else value


class ClientCore:
    """Sends calls, retries them, and cancels those that are abandoned.

    Args:
        endpoint: where the server listens.
        connect: returns a transport to it.
        runtime: how to wait.
        timeout: seconds to wait for an answer where a call does not say; None = no limit.
        retries: when a request is sent again.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        connect: Callable[[Endpoint], Transport],
        runtime: Runtime,
        timeout: float | None,
        retries: Retries,
    ) -> None:
        microseconds(timeout)  # refuses what is not a positive number
        self._timeout, self._retries, self._runtime = timeout, retries, runtime
        self._transport = connect(endpoint)

    async def close(self) -> None:
        """Closes the connection."""
        await self._transport.close()

    async def ready(self) -> bool:
        """See ``GlmImageClient.server_ready``."""
        return await self._transport.ready(self._timeout or READY_SECONDS)

    async def model_metadata(self, model: str) -> dict[str, Any]:
        """See ``GlmImageClient.model_metadata``."""
        return await self._transport.model_metadata(model, self._timeout)

    async def answer(self, prepare: Callable[[], Call[T]]) -> T:
        """Sends a call and returns its result.

        Args:
            prepare: makes the call; reads and encodes source images, which may take a while.

        Raises:
            GlmImageClientError: as ``GlmImageClient.generate``.
        """
        call = await self._runtime.in_thread(prepare)
        try:
            return await self._attempts(call)
        except (asyncio.CancelledError, KeyboardInterrupt, RequestTimeout):
            await self._give_up(call)
            raise

    async def events(self, prepare: Callable[[], Call[StreamEvent]]) -> AsyncGenerator[StreamEvent, None]:
        """Sends the call of a stream and yields its events; closing the generator cancels the request."""
        call = await self._runtime.in_thread(prepare)
        timeout = self._timeout if call.timeout is None else call.timeout
        event = None
        async with aclosing(
            self._transport.stream(call.model, call.tensors, request_id=call.request_id or "", timeout=timeout)
        ) as responses:
            async for outputs in responses:
                event = call.read(outputs)
                yield event
        check_complete(event)

    async def _attempts(self, call: Call[T]) -> T:
        attempts = Attempts(self._retries, self._timeout if call.timeout is None else call.timeout)
        while True:
            try:
                outputs = await self._transport.infer(
                    call.model, call.tensors, request_id=call.request_id or "", timeout=attempts.timeout
                )
            except GlmImageClientError as error:
                await self._runtime.sleep(attempts.pause_after(error))
            else:
                return call.read(outputs)

    async def _give_up(self, call: Call[Any]) -> None:
        # Triton does not propagate a disconnect to a running step of an ensemble.
        if call.request_id is not None:
            cancel = calls.cancel(call.request_id, timeout=GIVE_UP_SECONDS)
            with suppress(GlmImageClientError):
                await self._runtime.shielded(self._attempts(cancel))

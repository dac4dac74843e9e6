"""The gRPC half of ``transport`` for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeVar

import grpc
import tritonclient.grpc.aio as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from glm_image_client.grpc_transport import (
    WITH_STATUS,
    infer_arguments,
    is_final,
    may_be_unreachable,
    outputs_of,
    stream_arguments,
    told,
)
from glm_image_client.transport import LIVENESS_SECONDS, Endpoint, Tensor, with_integer_shapes

T = TypeVar("T")


class AsyncGrpcTransport:
    """One channel to a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._tls = endpoint.tls

    @cached_property
    def _client(self) -> Any:
        # A channel belongs to the loop that runs when it is made.
        return triton.InferenceServerClient(self._address, ssl=self._tls)

    async def infer(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str = "", timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``Transport.infer``."""
        arguments = infer_arguments(inputs, request_id, timeout)
        return outputs_of(await self._told(self._client.infer(model, **arguments), timeout))

    async def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ``Transport.stream``."""

        async def requests() -> AsyncGenerator[dict[str, Any], None]:
            yield {"model_name": model, **stream_arguments(inputs, request_id, timeout)}

        responses = self._client.stream_infer(requests(), stream_timeout=timeout, headers=WITH_STATUS)
        is_last = False
        try:
            while not is_last:
                result, error = await self._told(anext(responses), timeout)
                if error is not None:
                    raise told(error, self._address, timeout, live=True) from error
                is_last = is_final(result)
                if outputs := outputs_of(result):
                    yield outputs
        finally:
            if not is_last:
                responses.cancel()
            else:  # see ``GrpcTransport.stream``
                with suppress(grpc.RpcError):
                    async for _ in responses:
                        pass

    async def ready(self, timeout: float | None) -> bool:
        """See ``Transport.ready``."""
        try:
            return bool(await self._client.is_server_ready(client_timeout=timeout))
        except InferenceServerException:
            return False

    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """See ``Transport.model_metadata``."""
        asked = self._client.get_model_metadata(model, as_json=True, client_timeout=timeout)
        return with_integer_shapes(await self._told(asked, timeout))

    async def close(self) -> None:
        """See ``Transport.close``."""
        if "_client" in vars(self):
            await self._client.close()

    async def _told(self, call: Awaitable[T], timeout: float | None) -> T:
        try:
            return await call
        except InferenceServerException as error:
            live = not may_be_unreachable(error) or await self._live()
            raise told(error, self._address, timeout, live=live) from error

    async def _live(self) -> bool:
        try:
            return bool(await self._client.is_server_live(client_timeout=LIVENESS_SECONDS))
        except InferenceServerException:
            return False

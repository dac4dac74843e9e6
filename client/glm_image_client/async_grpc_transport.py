"""The transport over gRPC for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import grpc
import tritonclient.grpc.aio as triton
from numpy.typing import NDArray

from glm_image_client.grpc_transport import WITH_STATUS, GrpcBase, client_error, is_final, outputs_of, stream_arguments
from glm_image_client.transport import Tensor


class AsyncGrpcTransport(GrpcBase):
    """One channel to a server, for one loop."""

    @cached_property
    def _client(self) -> Any:
        # A channel belongs to the loop that runs when it is made.
        return triton.InferenceServerClient(self._address, ssl=self._tls)

    async def stream(
        self, model: str, inputs: Sequence[Tensor], *, request_id: str, timeout: float | None = None
    ) -> AsyncGenerator[dict[str, NDArray[Any]], None]:
        """See ``Transport``."""

        async def requests() -> AsyncGenerator[dict[str, Any], None]:
            yield {"model_name": model, **stream_arguments(inputs, request_id, timeout)}

        responses = self._client.stream_infer(requests(), stream_timeout=timeout, headers=WITH_STATUS)
        is_last = False
        try:
            while not is_last:
                result, error = await self._answer(lambda: anext(responses), timeout)
                if error is not None:
                    raise client_error(error, self._address, timeout, live=True) from error
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

    async def close(self) -> None:
        """See ``Transport``."""
        if "_client" in vars(self):
            await self._client.close()

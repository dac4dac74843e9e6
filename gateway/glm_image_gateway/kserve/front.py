"""What both protocols of the front share: who may call, a request's turn in the queue, and the models' metadata."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass

from glm_image_client.transport import Outputs, Request, Tensor
from glm_image_gateway.generation import Generator
from glm_image_gateway.keys import Caller, Keys
from glm_image_gateway.pools.tensors import Asked
from glm_image_gateway.pools.transport import CONTROL, PoolTransport
from glm_image_gateway.work import megapixel_steps


@dataclass(frozen=True)
class Inference:
    """A request of KServe's protocol.

    Attributes:
        seconds: its timeout; None = the gateway's.
        outputs: the names of those that are asked for; () = all.
    """

    request: Request
    seconds: float | None = None
    outputs: tuple[str, ...] = ()

    def asked_for(self, outputs: Outputs) -> Outputs:
        return {name: array for name, array in outputs.items() if not self.outputs or name in self.outputs}


class Front:
    """Sends requests to the pools, each in its turn.

    Args:
        transport: the pools.
        generator: which admits requests.
        keys: of the callers.
    """

    def __init__(self, transport: PoolTransport, generator: Generator, keys: Keys) -> None:
        self.transport, self._generator, self._keys = transport, generator, keys

    def caller(self, authorization: str | None) -> Caller:
        """Returns whom a request comes from; raises ``ApiError`` if the key is missing or unknown."""
        return self._keys.caller(authorization)

    async def infer(self, inference: Inference, caller: Caller) -> Outputs:
        """Returns the outputs of a request; raises the client's errors and ``ApiError``."""
        request = inference.request
        if request.model == CONTROL:
            return inference.asked_for(await self.transport.infer(request, inference.seconds))
        async with self._turn(inference, caller) as deadline:
            outputs = await self.transport.infer(request, max(0.001, deadline - time.monotonic()))
        return inference.asked_for(outputs)

    async def stream(self, inference: Inference, caller: Caller) -> AsyncGenerator[Outputs, None]:
        """Yields the outputs of each response; raises as ``infer``."""
        request = inference.request
        if request.model == CONTROL:
            yield await self.infer(inference, caller)
            return
        async with self._turn(inference, caller) as deadline:
            left = max(0.001, deadline - time.monotonic())
            async with aclosing(self.transport.stream(request, left)) as responses:
                async for outputs in responses:
                    yield inference.asked_for(outputs)

    def _turn(self, inference: Inference, caller: Caller) -> AbstractAsyncContextManager[float]:
        # Several requests may have the same id, as at a server.
        return self._generator.turn(caller, _work(inference.request.tensors), "", inference.seconds)


def _work(tensors: Sequence[Tensor]) -> float:
    asked = Asked.of(tensors)
    return megapixel_steps(asked.images, asked.pixels, asked.steps)

"""Pools as the client's transport: to its callers they are one server that serves both stages."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, Final, NoReturn

from glm_image_client.client import AsyncGlmImageClient
from glm_image_client.core import AsyncClientCore
from glm_image_client.errors import RefusedError, ServerFailure, UnreachableError
from glm_image_client.transport import Outputs, Request, Tensor, Transport
from glm_image_gateway.errors import shown
from glm_image_gateway.pools.events import StreamEvents
from glm_image_gateway.pools.flights import Flight, Flights, asked, together
from glm_image_gateway.pools.member import Member
from glm_image_gateway.pools.pool import Pool
from glm_image_gateway.pools.stages import Previews, StageCalls
from glm_image_gateway.pools.tensors import json_tensor, number_of, text_of

ENSEMBLE: Final = "glm_image"
STREAM: Final = "glm_image_stream"
CONTROL: Final = "glm_control"
MODELS: Final = (ENSEMBLE, STREAM, "glm_ar", "glm_dit", CONTROL)
"""The models of a server of both stages, which the pools serve together."""

PREVIEW_INPUTS: Final = {"preview_steps": (6, 50), "preview_every": (0, 200)}
"""Inputs of the stream alone: their default and their largest value."""
CONTROL_ACTIONS: Final = ("cancel", "status", "defaults", "describe")


class PoolTransport(Transport):
    """Sends each request to a member of ``glm_ar``, and its tokens to members of ``glm_dit``.

    Args:
        ar: the pool of the first stage.
        dit: the pool of the second.
        request_seconds: deadline of requests without a timeout.
    """

    def __init__(self, ar: Pool, dit: Pool, request_seconds: float) -> None:
        self._ar, self._dit, self._request_seconds = ar, dit, request_seconds
        self._flights = Flights()

    def start(self) -> None:
        """Begins to look up the members."""
        self._ar.start()
        self._dit.start()

    async def close(self) -> None:
        await self._ar.close()
        await self._dit.close()

    async def ready(self, timeout: float | None) -> bool:
        return bool(self._ar.ready and self._dit.ready)

    async def model_metadata(self, model: str, timeout: float | None) -> dict[str, Any]:
        """Returns the metadata of a stage from a member; that of the models over both stages is made of them.

        Raises:
            UnreachableError: no member is ready.
            ServerFailure: there is no such model.
        """
        if model not in MODELS:
            raise ServerFailure(f"the pools serve no model {shown(model)}; allowed: {', '.join(MODELS)}", "NOT_FOUND")
        if model in {"glm_ar", "glm_dit", CONTROL}:
            pool = self._ar if model == "glm_ar" else self._dit
            return await any_member(pool).transport.model_metadata(model, timeout)
        first = await any_member(self._ar).transport.model_metadata("glm_ar", timeout)
        second = await any_member(self._dit).transport.model_metadata("glm_dit_stream", timeout)
        inputs, outputs = list(first["inputs"]), [out for out in second["outputs"] if out["name"] != "event"]
        if model == STREAM:
            inputs += [{"name": name, "datatype": "INT32", "shape": [1]} for name in PREVIEW_INPUTS]
            outputs = second["outputs"]
        platform = "ensemble" if model == ENSEMBLE else "python"
        return {"name": model, "versions": ["1"], "platform": platform, "inputs": inputs, "outputs": outputs}

    async def infer(self, request: Request, timeout: float | None) -> Outputs:
        if request.model == CONTROL:
            return {"result": json_tensor(await self._control(request.tensors))}
        flight = Flight(request.request_id or uuid.uuid4().hex)
        calls = self._calls(request, flight, timeout)
        match request.model:
            case "glm_image":
                return await self._flights.run(flight, calls.generate())
            case "glm_ar":
                return await self._flights.run(flight, calls.prior())
            case "glm_dit":
                return await self._flights.run(flight, calls.paint())
        allowed = ", ".join(model for model in MODELS if model != STREAM)
        raise ServerFailure(f"the pools infer no model {shown(request.model)}; allowed: {allowed}", "NOT_FOUND")

    async def stream(self, request: Request, timeout: float | None) -> AsyncGenerator[Outputs, None]:
        """As ``infer``; the models that do not stream give one response."""
        if request.model != STREAM:
            yield await self.infer(request, timeout)
            return
        flight = Flight(request.request_id or uuid.uuid4().hex)
        sent: asyncio.Queue[Outputs | None] = asyncio.Queue()
        previews = Previews(*(_preview_number(request.tensors, name) for name in PREVIEW_INPUTS))
        own = [tensor for tensor in request.tensors if tensor.name not in PREVIEW_INPUTS]
        events = StreamEvents(flight.request_id, sent.put_nowait)
        calls = self._calls(replace(request, tensors=own), flight, timeout)
        job = asyncio.ensure_future(self._flights.run(flight, calls.stream(events, previews)))
        job.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (outputs := await sent.get()) is not None:
                yield outputs
            await job
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)

    def _calls(self, request: Request, flight: Flight, timeout: float | None) -> StageCalls:
        seconds = self._request_seconds if timeout is None else timeout
        request = replace(request, request_id=flight.request_id)
        return StageCalls(self._ar, self._dit, request, flight, seconds)

    async def _control(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Returns the reply of ``glm_control``: of this gateway, for requests of another one of all members."""
        action, request_id = (text_of(tensors, name) for name in ("action", "request_id"))
        if action not in CONTROL_ACTIONS:
            raise RefusedError(f"action is {shown(action or '')}; allowed: {', '.join(CONTROL_ACTIONS)}")
        if action == "defaults":
            member = any_member(self._ar)
            for reply in await asked({member: None}, action, ""):
                return reply
            _unreachable(self._ar)
        members = dict.fromkeys((*self._ar.ready, *self._dit.ready))
        if action == "describe":
            return {"action": action, "stages": self._described()}
        if not request_id:
            raise RefusedError("request_id is ''; allowed: the id that a request was sent with")
        if not self._flights.knows(request_id):
            return together(action, request_id, await asked(members, action, request_id))
        own = self._flights.cancel if action == "cancel" else self._flights.status
        return await own(request_id)

    def _described(self) -> dict[str, Any]:
        """Returns what each pool serves: its members by their address."""
        return {
            pool.stage: {
                member.place.address: {"ready": member.is_ready, **vars(member.description)}
                for member in pool.members
                if member.description is not None
            }
            for pool in (self._ar, self._dit)
        }


class PoolClient(AsyncGlmImageClient):
    """The client's calls over pools."""

    def __init__(self, transport: PoolTransport) -> None:
        self._core = AsyncClientCore(transport)


def any_member(pool: Pool) -> Member:
    """Returns a member that is ready.

    Raises:
        UnreachableError: there is none.
    """
    if not pool.ready:
        _unreachable(pool)
    return pool.ready[0]


def _unreachable(pool: Pool) -> NoReturn:
    raise UnreachableError(f"no member of {pool.stage} is ready; it has {len(pool.members)}")


def _preview_number(tensors: Sequence[Tensor], name: str) -> int:
    default, most = PREVIEW_INPUTS[name]
    value = number_of(tensors, name, default)
    if not 0 <= value <= most:
        raise RefusedError(f"{name} is {value}; allowed: 0 to {most}")
    return value

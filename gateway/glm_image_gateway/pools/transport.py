"""Pools as the client's transport: to its callers they are one server that serves both stages."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from glm_image_client.client import AsyncGlmImageClient
from glm_image_client.core import AsyncClientCore
from glm_image_client.errors import BusyError, ServerFailure, UnreachableError
from glm_image_client.result import PriorTokens, json_output
from glm_image_client.transport import Outputs, Request, Transport
from glm_image_gateway.pools.member import Member
from glm_image_gateway.pools.pool import Pool, StaleTokensError, Wanted
from glm_image_gateway.pools.tensors import AR_STAGES, QUEUES, Asked, dit_inputs, merged, parts_of, text_of, with_seed
from glm_image_gateway.routing import Work, share_out

RANDOM_SEEDS: Final = 2**53
"""Seeds that the gateway draws are below it, as those of the server."""
MAX_STARTS: Final = 3
"""Times that a request begins with the first stage: its checkpoint may leave the second pool meanwhile."""


class PoolTransport(Transport):
    """Sends each request to a member of ``glm_ar``, and its tokens to members of ``glm_dit``.

    Args:
        ar: the pool of the first stage.
        dit: the pool of the second.
        request_seconds: deadline of requests without a timeout.
    """

    def __init__(self, ar: Pool, dit: Pool, request_seconds: float) -> None:
        self._ar, self._dit, self._request_seconds = ar, dit, request_seconds

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
        member = self._any_member(self._dit)
        return await member.transport.model_metadata(model, timeout)

    async def infer(self, request: Request, timeout: float | None) -> Outputs:
        deadline = time.monotonic() + (self._request_seconds if timeout is None else timeout)
        match request.model:
            case "glm_image":
                return await self._generate(request, deadline)
        raise ServerFailure(f"the pools serve no model {request.model}", "NOT_FOUND")

    async def stream(self, request: Request, timeout: float | None) -> AsyncGenerator[Outputs, None]:
        raise ServerFailure(f"the pools serve no model {request.model}", "NOT_FOUND")
        yield {}

    async def _generate(self, request: Request, deadline: float) -> Outputs:
        """Calls both stages; begins again if no member of the second has the checkpoint of the first any more."""
        tensors = with_seed(request.tensors, secrets.randbelow(RANDOM_SEEDS))
        asked = Asked.of(tensors)
        for _ in range(MAX_STARTS):
            try:
                prior = await self._prior(replace(request, model="glm_ar", tensors=tensors), asked, deadline)
                return await self._render(request, asked, prior, deadline)
            except StaleTokensError:
                continue
        raise BusyError("the checkpoints of glm_ar and glm_dit differ: try again later")

    async def _prior(self, request: Request, asked: Asked, deadline: float) -> PriorTokens:
        wanted = Wanted(text_of(request.tensors, "revision"), self._dit.fingerprints() or None)
        work = asked.ar_work()

        async def send(member: Member, left: float) -> Outputs:
            return await member.transport.infer(request, left)

        outputs = await self._ar.call(work, wanted, deadline, send)
        prior = PriorTokens.from_outputs(outputs)
        self._ar.predictor.add(work, _busy_seconds(prior.ar_metadata.get("seconds", {})))
        return prior

    async def _render(self, request: Request, asked: Asked, prior: PriorTokens, deadline: float) -> Outputs:
        height, width = prior.resolved_size
        asked = replace(asked, pixels=int(height * width), images=len(prior.prior_token_ids))
        counts = share_out(asked.images, len(self._dit.ready))
        parts = [
            self._part(
                replace(request, model="glm_dit", tensors=dit_inputs(request.tensors, part)), asked, part, deadline
            )
            for part in parts_of(prior, counts)
        ]
        return merged(await all_or_none(parts))

    async def _part(self, request: Request, asked: Asked, prior: PriorTokens, deadline: float) -> Outputs:
        work = asked.dit_work(len(prior.prior_token_ids))
        fingerprint = prior.ar_metadata.get("fingerprint")
        wanted = Wanted(None, None if fingerprint is None else frozenset({fingerprint}))

        async def send(member: Member, left: float) -> Outputs:
            return await member.transport.infer(request, left)

        outputs = await self._dit.call(work, wanted, deadline, send)
        self._learn(work, outputs)
        return outputs

    def _learn(self, work: Work, outputs: Outputs) -> None:
        seconds = json_output(outputs, "metadata").get("seconds", {})
        self._dit.predictor.add(work, _busy_seconds(seconds, without=AR_STAGES))

    def _any_member(self, pool: Pool) -> Member:
        for member in pool.ready:
            return member
        raise UnreachableError(f"no member of {pool.stage} is ready")


class PoolClient(AsyncGlmImageClient):
    """The client's calls over pools."""

    def __init__(self, transport: PoolTransport) -> None:
        self._core = AsyncClientCore(transport)


def _busy_seconds(seconds: dict[str, float], without: Sequence[str] = ()) -> float:
    """Returns the seconds in which a stage worked on a request, without those in queues."""
    return sum(value for stage, value in seconds.items() if stage not in QUEUES and stage not in without)


async def all_or_none(calls: Sequence[Coroutine[Any, Any, Outputs]]) -> list[Outputs]:
    """Returns the results of calls that run at the same time; the first error cancels the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

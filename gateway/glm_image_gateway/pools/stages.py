"""The calls of one request to the stages, each at a member of its pool."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from glm_image_client.errors import BusyError, GlmImageClientError, ServerFailure
from glm_image_client.result import PriorTokens, json_output
from glm_image_client.transport import Outputs, Request, Tensor
from glm_image_gateway.concurrency import all_or_none
from glm_image_gateway.pools.events import Event, StreamEvents
from glm_image_gateway.pools.flights import Flight
from glm_image_gateway.pools.member import Member
from glm_image_gateway.pools.pool import Pool, StaleTokensError, Wanted
from glm_image_gateway.pools.tensors import (
    AR_STAGES,
    QUEUES,
    Asked,
    dit_inputs,
    integer_tensor,
    merged,
    parts_of,
    preview_prior,
    text_of,
    with_seed,
)
from glm_image_gateway.routing import Work, share_out

RANDOM_SEEDS: Final = 2**53
"""Seeds that the gateway draws are below it, as those of the server."""
MAX_STARTS: Final = 3
"""Times that a request begins with the first stage: its checkpoint may leave the second pool meanwhile."""
PREVIEW_SECONDS: Final = 10.0
"""A preview that has not been rendered by then is of no more use."""

OnEvent = Callable[[Event, Outputs], object]


@dataclass(frozen=True)
class Previews:
    """Intermediate images of a stream: denoising steps of the preview, and between two latent previews; 0 = none."""

    steps: int
    every: int


class StageCalls:
    """The calls of one request.

    Args:
        ar: the pool of the first stage.
        dit: the pool of the second.
        request: with an id.
        flight: the same request, as it is found by its id.
        seconds: until its deadline.
    """

    def __init__(self, ar: Pool, dit: Pool, request: Request, flight: Flight, seconds: float) -> None:
        self._ar, self._dit, self._request, self._flight = ar, dit, request, flight
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        self._tensors = with_seed(request.tensors, secrets.randbelow(RANDOM_SEEDS))
        self._asked = Asked.of(self._tensors)
        self._revision = text_of(self._tensors, "revision") or None

    async def generate(self) -> Outputs:
        """Calls both stages, and returns the outputs of ``glm_image``."""
        return await self._both(self._prior, self._render)

    async def stream(self, events: StreamEvents, previews: Previews) -> None:
        """As ``generate``, with the events of ``glm_image_stream``."""
        events.queued("ar_queue")
        async with _Helpers() as helpers:
            outputs = await self._both(
                lambda: self._prior_with_events(events, previews, helpers),
                lambda prior: self._render_with_events(prior, events, previews),
            )
        events.last(outputs)

    async def prior(self) -> Outputs:
        """Calls ``glm_ar``."""
        return await self._call_ar(self._plain("glm_ar", self._tensors), Wanted(self._revision))

    async def paint(self) -> Outputs:
        """Calls ``glm_dit`` with the tokens that the request has."""
        ids = next((tensor.data for tensor in self._request.tensors if tensor.name == "prior_token_ids"), None)
        work = self._asked.dit_work(1 if ids is None else max(1, len(ids)))
        fingerprint = _fingerprint(text_of(self._request.tensors, "ar_metadata"))
        wanted = Wanted(self._revision, None if fingerprint is None else frozenset({fingerprint}))
        try:
            return await self._call_dit(work, wanted, self._plain("glm_dit", self._request.tensors))
        except StaleTokensError:
            # A member refuses them with its own words.
            return await self._call_dit(work, Wanted(self._revision), self._plain("glm_dit", self._request.tensors))

    async def _both(
        self,
        first: Callable[[], Coroutine[Any, Any, PriorTokens]],
        second: Callable[[PriorTokens], Coroutine[Any, Any, Outputs]],
    ) -> Outputs:
        """Calls both stages; begins again if no member of the second has the checkpoint of the first any more."""
        for _ in range(MAX_STARTS):
            try:
                return await second(await first())
            except StaleTokensError:
                continue
        raise BusyError("the checkpoints of glm_ar and glm_dit differ: try again later")

    async def _prior(self, send: _Send | None = None) -> PriorTokens:
        self._flight.queue = "ar_queue"
        wanted = Wanted(self._revision, self._dit.fingerprints() or None)
        outputs = await self._call_ar(send or self._plain("glm_ar", self._tensors), wanted)
        prior = PriorTokens.from_outputs(outputs)
        self._ar.predictor.add(self._asked.ar_work(), _busy_seconds(prior.ar_metadata.get("seconds", {})))
        height, width = (int(side) for side in prior.resolved_size)
        self._asked = replace(self._asked, pixels=height * width, images=len(prior.prior_token_ids))
        self._flight.queue = "dit_queue"
        return prior

    async def _prior_with_events(self, events: StreamEvents, previews: Previews, helpers: _Helpers) -> PriorTokens:
        tensors = [*self._tensors, integer_tensor("preview_tokens", int(previews.steps > 0))]
        dit_seconds = self._dit.predictor.seconds(self._asked.dit_work(self._asked.images))

        def on_event(event: Event, _: Outputs) -> None:
            if event["event"] == "preview_tokens":
                helpers.add("preview", self._preview(event, events, previews))
            else:
                events.of_ar(event, dit_seconds)

        prior = await self._prior(self._streamed("glm_ar_stream", tensors, on_event))
        events.queued("dit_queue")
        return prior

    async def _render(self, prior: PriorTokens) -> Outputs:
        parts = parts_of(prior, share_out(self._asked.images, len(self._dit.ready)))
        return merged(await all_or_none([self._part(part, self._plain) for part in parts]))

    async def _render_with_events(self, prior: PriorTokens, events: StreamEvents, previews: Previews) -> Outputs:
        events.steps = self._asked.images * self._asked.steps
        every = integer_tensor("preview_every", previews.every)

        def streamed(part: int) -> Callable[[str, Sequence[Tensor]], _Send]:
            def on_event(event: Event, outputs: Outputs) -> None:
                events.of_part(part, event, outputs)

            return lambda model, tensors: self._streamed(f"{model}_stream", [*tensors, every], on_event)

        parts = parts_of(prior, share_out(self._asked.images, len(self._dit.ready)))
        calls = [self._part(part, streamed(index)) for index, part in enumerate(parts)]
        return merged(await all_or_none(calls))

    async def _part(self, prior: PriorTokens, send: Callable[[str, Sequence[Tensor]], _Send]) -> Outputs:
        work = self._asked.dit_work(len(prior.prior_token_ids))
        fingerprint = prior.ar_metadata.get("fingerprint")
        wanted = Wanted(fingerprints=None if fingerprint is None else frozenset({fingerprint}))
        return await self._call_dit(work, wanted, send("glm_dit", dit_inputs(self._tensors, prior)))

    async def _preview(self, event: Event, events: StreamEvents, previews: Previews) -> None:
        """Has a member of the second pool render the preview, and sends it; the request goes on without it."""
        shown = {name: event[name] for name in ("stage", "done", "total")} | {"eta": None}
        try:
            inputs = dit_inputs(self._tensors, preview_prior(event["preview"]))
            own = [tensor for tensor in inputs if tensor.name not in {"num_inference_steps", "image"}]
            steps = integer_tensor("num_inference_steps", previews.steps)
            request = self._sent("glm_dit_stream", [*own, steps, integer_tensor("is_preview", 1)])
            member = self._dit.least_loaded()
            outputs = await consume(member, request, PREVIEW_SECONDS, lambda *_: None)
            rendered = json_output(outputs, "event")
        except GlmImageClientError as error:
            events.put({**shown, "event": "preview_skipped", "reason": "error", "message": str(error)})
            return
        reasons: dict[str, Any] = {name: rendered[name] for name in ("reason", "message") if name in rendered}
        events.put({**shown, "event": rendered["event"], **reasons}, {"images_base64": outputs["images_base64"]})

    async def _call_ar(self, send: _Send, wanted: Wanted) -> Outputs:
        return await self._ar.call(self._asked.ar_work(), wanted, self._deadline, self._noted(send))

    async def _call_dit(self, work: Work, wanted: Wanted, send: _Send) -> Outputs:
        outputs = await self._dit.call(work, wanted, self._deadline, self._noted(send))
        seconds = json_output(outputs, "metadata").get("seconds", {})
        self._dit.predictor.add(work, _busy_seconds(seconds, without=AR_STAGES))
        return outputs

    def _noted(self, send: _Send) -> _Send:
        """Returns a call during which the member is one of those that work on the request."""

        async def noted(member: Member, left: float) -> Outputs:
            with self._at(member):
                return await send(member, left)

        return noted

    @contextmanager
    def _at(self, member: Member) -> Iterator[None]:
        self._flight.members.append(member)
        try:
            yield
        finally:
            self._flight.members.remove(member)

    def _plain(self, model: str, tensors: Sequence[Tensor]) -> _Send:
        request = self._sent(model, tensors)
        return lambda member, left: member.transport.infer(request, left)

    def _streamed(self, model: str, tensors: Sequence[Tensor], on_event: OnEvent) -> _Send:
        request = self._sent(model, tensors)
        return lambda member, left: consume(member, request, left, on_event)

    def _sent(self, model: str, tensors: Sequence[Tensor]) -> Request:
        return Request(model, tensors, self._request.request_id)


_Send = Callable[[Member, float], Coroutine[Any, Any, Outputs]]


class _Helpers:
    """Tasks that run along with a request, at most one of a name; its end cancels those that still run."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Future[None]] = {}

    def add(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        if name in self._tasks:
            work.close()
        else:
            self._tasks[name] = asyncio.ensure_future(work)

    async def __aenter__(self) -> _Helpers:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


async def consume(member: Member, request: Request, left: float, on_event: OnEvent) -> Outputs:
    """Returns the outputs of the last response of a stage's stream; the other ones go to ``on_event``.

    Raises:
        ServerFailure: the stream ended before it.
    """
    last: Outputs | None = None
    async with aclosing(member.transport.stream(request, left)) as responses:
        async for outputs in responses:
            event = json_output(outputs, "event")
            if event["stage"] == "done":
                last = outputs
            else:
                on_event(event, outputs)
    if last is None:
        raise ServerFailure("the stream of the stage ended before its last response", "UNAVAILABLE")
    return last


def _busy_seconds(seconds: Mapping[str, float], without: Sequence[str] = ()) -> float:
    """Returns the seconds in which a stage worked on a request, without those in queues."""
    return sum(value for stage, value in seconds.items() if stage not in QUEUES and stage not in without)


def _fingerprint(ar_metadata: str | None) -> str | None:
    try:
        found = json.loads(ar_metadata or "{}").get("fingerprint")
    except (ValueError, AttributeError):
        return None  # the member refuses it
    return found if isinstance(found, str) else None

"""Runs requests of images on the server: their turn in the queue, their parts, their deadline, and what they return."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from glm_image_client import (
    AsyncGlmImageClient,
    GenerateOptions,
    GenerationResult,
    GlmImageClientError,
    PreviewOptions,
    StreamEvent,
    StreamOptions,
)
from glm_image_gateway.concurrency import all_or_none
from glm_image_gateway.errors import ApiError, api_error
from glm_image_gateway.fair_queue import FairQueue
from glm_image_gateway.keys import Caller
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.pictures import Mask, recompressed
from glm_image_gateway.translation import ImageRequest, decoded, folded
from glm_image_gateway.work import SpeedEstimate, megapixel_steps

IMAGES_PER_CALL: Final = 8
"""The server's ``num_images``; a larger request is sent as two."""
PREVIEW_PIXELS: Final = 725 * 725
"""About the size below which the server makes no preview."""
MAX_PREVIEW_EVERY: Final = 200
"""The largest that the server takes; more steps are refused by their own name."""
PREVIEW_STEPS: Final = 6
ENDING_SECONDS: Final = 3.0
"""Longest wait for the end of an abandoned request whose id another one has; its cancellation takes 2 s at most."""


@dataclass(frozen=True)
class Generated:
    """The images of a request.

    Attributes:
        files: the base64 of each image file.
        metadata: the server's metadata; of a request in two parts, seconds are summed and lists joined.
    """

    files: list[bytes] = field(repr=False)
    metadata: dict[str, Any]

    @property
    def size(self) -> str:
        return f"{self.metadata['width']}x{self.metadata['height']}"

    @property
    def seeds(self) -> list[int]:
        return list(self.metadata["seeds"])


@dataclass(frozen=True)
class Progress:
    """An event of a request that is streamed: its state, an intermediate image, or the images.

    Attributes:
        partial: the base64 of an intermediate image, a PNG.
        generated: the images, in the last event.
    """

    stage: str
    done: int
    total: int
    eta: float | None = None
    partial: bytes | None = field(default=None, repr=False)
    generated: Generated | None = None

    def state(self) -> dict[str, Any]:
        """Returns how far the request is, as answers have it."""
        return {"stage": self.stage, "done": self.done, "total": self.total, "eta_seconds": self.eta}


class Generator:
    """Sends requests to a server."""

    def __init__(self, client: AsyncGlmImageClient, queue: FairQueue, metrics: Metrics, request_seconds: float) -> None:
        self._client, self._queue, self._metrics = client, queue, metrics
        self._request_seconds = request_seconds
        self._speed = SpeedEstimate()
        self._ended: dict[str, asyncio.Event] = {}

    def expected_wait(self) -> float:
        """Returns the predicted seconds of all requests that have not ended."""
        return self._queue.expected_wait()

    async def generate(self, request: ImageRequest, caller: Caller, request_id: str) -> Generated:
        """Generates a request's images.

        Raises:
            ApiError: the request is refused, or failed.
        """
        mask = await _mask(request)
        async with self._turn(request, caller, request_id) as deadline:
            parts = [
                self._client.generate(request.prompt, **_call_options(part, request_id, deadline))
                for part in _parts(request)
            ]
            results = await all_or_none(parts)
        return await self._finished(request, mask, results)

    async def stream(
        self, request: ImageRequest, caller: Caller, request_id: str, *, is_resumed: bool = False
    ) -> AsyncGenerator[Progress, None]:
        """Generates a request's images and yields its progress; the last event has the images.

        Closing the generator cancels the request. Raises as ``generate``.
        """
        mask = await _mask(request)
        results = []
        started = time.monotonic()
        has_image = False
        async with self._turn(request, caller, request_id, is_resumed=is_resumed) as deadline:
            for part in _parts(request):
                options = StreamOptions(**_call_options(part, request_id, deadline), **_preview_options(request))
                async with aclosing(self._client.stream(request.prompt, **options)) as events:
                    async for event in events:
                        if event.result is not None:
                            results.append(event.result)
                            continue
                        for progress in await _progress(event, mask):
                            if progress.partial is not None and not has_image:
                                has_image = True
                                self._metrics.first_image_seconds.observe(time.monotonic() - started)
                            yield progress
        generated = await self._finished(request, mask, results)
        if not has_image:
            self._metrics.first_image_seconds.observe(time.monotonic() - started)
        yield Progress("image", 1, 1, 0.0, generated=generated)

    @asynccontextmanager
    async def turn(
        self,
        caller: Caller,
        work: float,
        request_id: str,
        seconds: float | None = None,
        *,
        is_resumed: bool = False,
    ) -> AsyncIterator[float]:
        """Waits for a request's turn, and yields its deadline on the monotonic clock.

        Args:
            caller: whom the request comes from.
            work: megapixel-steps.
            request_id: that no other request in flight may have; "" = none.
            seconds: its timeout; None = that of the gateway, which is the longest.
            is_resumed: whether limits do not count.

        Raises:
            ApiError: the id is in use, a limit is reached, or the request has waited too long.
        """
        limit = self._request_seconds if seconds is None else min(seconds, self._request_seconds)
        if request_id:
            await self._wait_until_free(request_id)
        arrived = time.monotonic()
        ticket = self._queue.admit(caller, self._speed.seconds(work), work, is_resumed=is_resumed)
        ended = asyncio.Event()
        if request_id:
            self._ended[request_id] = ended
        try:
            try:
                await asyncio.wait_for(ticket.wait(), limit)
            except (TimeoutError, asyncio.TimeoutError):
                message = f"the request waited {limit:g} s in the gateway's queue, its time limit"
                raise ApiError(504, message, "deadline_exceeded", should_retry=False) from None
            self._metrics.stage_seconds.labels("gateway_queue").observe(time.monotonic() - arrived)
            yield arrived + limit
        finally:
            if request_id:
                del self._ended[request_id]
            ended.set()
            ticket.release()

    @asynccontextmanager
    async def _turn(
        self, request: ImageRequest, caller: Caller, request_id: str, *, is_resumed: bool = False
    ) -> AsyncIterator[float]:
        """As ``turn``; the client's errors become ``ApiError``."""
        work = megapixel_steps(request.count, request.pixels, request.steps)
        try:
            async with self.turn(caller, work, request_id, is_resumed=is_resumed) as deadline:
                yield deadline
        except GlmImageClientError as error:
            refusal = api_error(error)
            if refusal.param in {"width", "height"} and request.has_size:
                refusal.param = "size"
            raise refusal from error

    async def _wait_until_free(self, request_id: str) -> None:
        """Waits a moment for another request with the id, as a client may repeat one that it has just abandoned.

        Raises:
            ApiError: the other request is still in flight.
        """
        if request_id in self._ended:
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._ended[request_id].wait(), ENDING_SECONDS)
        if request_id in self._ended:
            message = f"x-request-id is {request_id}, which another request in flight has; allowed: an id of its own"
            raise ApiError(409, message, "request_id_in_use", param="x-request-id", should_retry=False)

    async def _finished(
        self, request: ImageRequest, mask: Mask | None, results: Sequence[GenerationResult]
    ) -> Generated:
        files = [file for result in results for file in result.base64_files]
        metadata = merged_metadata([dict(result.metadata.raw) for result in results])
        self._metrics.observe_stages(metadata["seconds"])
        self._metrics.images.inc(len(files))
        busy = sum(duration for stage, duration in metadata["seconds"].items() if not stage.endswith("queue"))
        work = megapixel_steps(len(files), metadata["width"] * metadata["height"], metadata["steps"])
        self._speed.add(work, busy)
        if mask is not None or request.compression is not None:
            files = await asyncio.to_thread(_processed, request, mask, files)
        return Generated(files, metadata)


async def _mask(request: ImageRequest) -> Mask | None:
    if request.mask is None:
        return None
    return await asyncio.to_thread(lambda mask: Mask(decoded(request.images[0], "image"), mask), request.mask)


def _processed(request: ImageRequest, mask: Mask | None, files: Sequence[bytes]) -> list[bytes]:
    processed = []
    for file in map(base64.b64decode, files):
        if mask is None:
            image = recompressed(file, request.output_format, request.compression)
        else:
            image = mask.composited(file, request.output_format, request.compression)
        processed.append(base64.b64encode(image))
    return processed


def _parts(request: ImageRequest) -> list[GenerateOptions]:
    """Returns the options of each call: the server takes at most ``IMAGES_PER_CALL`` images in one."""
    # The gateway's own work needs an image without loss.
    sent = "png" if request.mask is not None or request.compression is not None else request.output_format
    options = GenerateOptions(**request.options, output_format=sent)  # type: ignore[typeddict-item]
    if request.images:
        options["images"] = request.images
    if request.count <= IMAGES_PER_CALL:
        return [{**options, "num_images": request.count}]
    seed = options.get("seed")
    first = secrets.randbelow(2**53) if seed is None else seed
    counts = [IMAGES_PER_CALL, request.count - IMAGES_PER_CALL]
    seeds = [first, folded((first + IMAGES_PER_CALL) % 2**64)]
    return [{**options, "num_images": count, "seed": part} for count, part in zip(counts, seeds, strict=True)]


def _call_options(part: GenerateOptions, request_id: str, deadline: float) -> GenerateOptions:
    return {**part, "request_id": request_id, "timeout": max(0.001, deadline - time.monotonic())}


def _preview_options(request: ImageRequest) -> PreviewOptions:
    """Returns how often intermediate images are sent: a preview where there is one, the others at equal distances."""
    if request.partial_images == 0:
        return {"preview_steps": 0, "preview_every": 0}
    has_preview = not request.images and request.pixels >= PREVIEW_PIXELS
    latents = request.partial_images - has_preview
    every = min(MAX_PREVIEW_EVERY, max(1, request.steps // (latents + 1))) if latents else 0
    return {"preview_steps": PREVIEW_STEPS, "preview_every": every}


async def _progress(event: StreamEvent, mask: Mask | None) -> list[Progress]:
    progress = Progress(event.stage, event.done, event.total, event.eta)
    if not event.base64_files:
        return [progress]
    partials = event.base64_files
    if mask is not None:
        partials = await asyncio.to_thread(_masked, mask, partials)
    return [replace(progress, partial=partial) for partial in partials]


def _masked(mask: Mask, files: Sequence[bytes]) -> list[bytes]:
    return [base64.b64encode(mask.composited(base64.b64decode(file), "png", None)) for file in files]


def merged_metadata(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the metadata of a request that was sent in parts."""
    merged = dict(parts[0])
    for part in parts[1:]:
        merged["seeds"] = [*merged["seeds"], *part["seeds"]]
        merged["cached_steps"] = [*merged.get("cached_steps", ()), *part.get("cached_steps", ())]
        names = {*merged["seconds"], *part["seconds"]}
        merged["seconds"] = {name: merged["seconds"].get(name, 0) + part["seconds"].get(name, 0) for name in names}
    return merged

"""Runs jobs: one task each, whose result and end are written before anyone is informed."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Final

from glm_image_gateway import webhooks
from glm_image_gateway.answers import images_answer
from glm_image_gateway.bodies import Read, validated
from glm_image_gateway.database import Database
from glm_image_gateway.errors import ApiError
from glm_image_gateway.generation import Generated, Generator, Progress
from glm_image_gateway.job_store import Job, JobStore, Status
from glm_image_gateway.keys import Caller, Keys
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.schemas import JobBody
from glm_image_gateway.settings import GatewaySettings
from glm_image_gateway.storage import Storage
from glm_image_gateway.translation import ImageRequest, generation

logger = logging.getLogger(__name__)

MAX_STARTS: Final = 3
"""A job during which the gateway has ended this often has failed."""
MAX_ID_CHARACTERS: Final = 200
"""Of the first request's id in that of a resumed job's request."""
RETRY_SECONDS: Final = 2.0
"""Between two attempts while no server answers."""
WAITED_FOR: Final = frozenset({"server_unavailable", "queue_full", "too_many_requests", "rate_limit_exceeded"})
"""Errors after which a job is tried again, until its time limit."""


class JobRunner:
    """The jobs of a gateway."""

    def __init__(
        self,
        settings: GatewaySettings,
        database: Database,
        storage: Storage,
        generator: Generator,
        keys: Keys,
        metrics: Metrics,
    ) -> None:
        self._settings, self._store, self._storage = settings, JobStore(database), storage
        self._generator, self._keys, self._metrics = generator, keys, metrics
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._progress: dict[tuple[str, str], Progress] = {}
        self._webhooks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    async def start(self) -> None:
        """Resumes what a gateway has left; with the same seed a job has the same images."""
        await self._store.remove_ended_before(time.time() - self._settings.file_hours * 3600)
        for job in await self._store.open_jobs():
            logger.info("job %s of %s is resumed", job.id, job.owner)
            self._begin(job, self._keys.named(job.owner), is_resumed=True)

    async def close(self) -> None:
        """Stops all jobs; the next gateway resumes them."""
        self._is_closing = True
        tasks = [*self._tasks.values(), *self._webhooks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, read: Read, caller: Caller, job_id: str | None, request_id: str) -> tuple[Job, bool]:
        """Adds a job and returns it, and whether it is new; the same request with the same id is one job.

        Raises:
            ApiError: the request is refused, or another one has the id.
        """
        request = _request(read.fields, strict=self._settings.strict)
        if request.stream:
            raise ApiError(400, "stream is true; allowed in a job: false", "invalid_value", param="stream")
        webhook = webhooks.checked(read.fields.get("webhook"), self._settings.webhook_hosts)
        body = dict(read.fields)
        if "seed" not in body:
            body["seed"] = secrets.randbelow(2**53)
        job = Job(
            caller.name,
            job_id or f"job_{secrets.token_urlsafe(18)}",
            request_id,
            "queued",
            body,
            webhook,
            time.time(),
        )
        if len(self._tasks) >= self._settings.max_queue and await self._store.find(job.owner, job.id) is None:
            message = f"{len(self._tasks)} jobs have not ended, as many as --max-queue allows"
            raise ApiError(429, message, "queue_full", retry_after=self._generator.expected_wait())
        present = await self._store.add(job)
        if present is not None:
            if {**present.body, "seed": body["seed"]} != body or ("seed" in read.fields and present.body != body):
                raise ApiError(
                    409, f"job {job_id} has another body; allowed: a new id", "job_exists", should_retry=False
                )
            return present, False
        self._begin(job, caller)
        return job, True

    async def find(self, owner: str, job_id: str) -> Job:
        """Returns a job.

        Raises:
            ApiError: its owner has none of the id.
        """
        job = await self._store.find(owner, job_id)
        if job is None:
            raise ApiError(404, "there is no such job", "job_not_found")
        return job

    def progress(self, job: Job) -> Progress | None:
        """Returns the latest progress of a running job."""
        return self._progress.get((job.owner, job.id))

    async def cancel(self, owner: str, job_id: str) -> Job:
        """Cancels a job if it has not ended, and returns it."""
        await self.find(owner, job_id)
        task = self._tasks.get((owner, job_id))
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        return await self.find(owner, job_id)

    def _begin(self, job: Job, caller: Caller, *, is_resumed: bool = False) -> None:
        place = (job.owner, job.id)
        task = asyncio.ensure_future(self._run(job, caller, is_resumed=is_resumed))
        self._tasks[place] = task

        def forget(_: object) -> None:
            self._tasks.pop(place, None)
            self._progress.pop(place, None)

        task.add_done_callback(forget)

    async def _run(self, job: Job, caller: Caller, *, is_resumed: bool) -> None:
        status: Status = "failed"
        result: dict[str, Any] | None = None
        error: dict[str, Any] | None = None
        try:
            if job.starts >= MAX_STARTS:
                message = f"the gateway ended {job.starts} times during the job"
                raise ApiError(500, message, "gateway_ended")
            request = _request(job.body, strict=False)
            generated = await self._generated(job, request, caller, is_resumed=is_resumed)
            result, status = await self._stored(request, generated), "done"
        except ApiError as refused:
            error = refused.body()["error"]
        except asyncio.CancelledError:
            if self._is_closing:
                raise
            status, error = "cancelled", ApiError(499, "the job was cancelled", "request_cancelled").body()["error"]
        except Exception as unexpected:  # a job ends with its error
            logger.exception("job %s failed", job.id)
            error = ApiError(500, f"{type(unexpected).__name__}: {unexpected}", "server_error").body()["error"]
        await asyncio.shield(self._store.end(job, status, result, error))
        self._metrics.jobs.labels(status).inc()
        if job.webhook is not None:
            self._inform(job)

    async def _generated(self, job: Job, request: ImageRequest, caller: Caller, *, is_resumed: bool) -> Generated:
        until = time.monotonic() + self._settings.request_seconds
        while True:
            try:
                return await self._attempt(job, request, caller, is_resumed=is_resumed)
            except ApiError as error:
                if error.code not in WAITED_FOR or time.monotonic() >= until:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    async def _attempt(self, job: Job, request: ImageRequest, caller: Caller, *, is_resumed: bool) -> Generated:
        # The earlier gateway's cancel of its request may arrive after this one, and must not reach it.
        request_id = f"{job.request_id[:MAX_ID_CHARACTERS]}-{secrets.token_hex(4)}" if is_resumed else job.request_id
        events = self._generator.stream(request, caller, request_id, is_resumed=is_resumed)
        has_begun = False
        async with aclosing(events):
            async for progress in events:
                if not has_begun and progress.stage != "ar_queue":
                    has_begun = True
                    await self._store.begin(job)
                self._progress[job.owner, job.id] = progress
                if progress.generated is not None:
                    return progress.generated
        raise ApiError(500, "the server ended the stream before it sent the images", "server_error")

    async def _stored(self, request: ImageRequest, generated: Generated) -> dict[str, Any]:
        names = []
        for file in generated.files:
            content = await asyncio.to_thread(base64.b64decode, file)
            names.append((await self._storage.save(content, request.output_format)).name)
        data = [{"file": name} for name in names]
        return {**images_answer(request, generated, data), "response_format": request.response_format}

    def _inform(self, job: Job) -> None:
        async def inform() -> None:
            await webhooks.post(await self.find(job.owner, job.id))

        task = asyncio.ensure_future(inform())
        self._webhooks.add(task)
        task.add_done_callback(self._webhooks.discard)


def _request(fields: Mapping[str, Any], *, strict: bool) -> ImageRequest:
    return generation(validated(JobBody, fields), strict=strict)

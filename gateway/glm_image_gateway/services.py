"""The parts of a gateway, made once and shared by its routes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import Request

from glm_image_client import AsyncGlmImageClient
from glm_image_gateway.bodies import Read, read_fields
from glm_image_gateway.database import Database
from glm_image_gateway.errors import ApiError, shown
from glm_image_gateway.fair_queue import FairQueue, Window
from glm_image_gateway.generation import Generator
from glm_image_gateway.job_runner import JobRunner
from glm_image_gateway.keys import Caller, Keys
from glm_image_gateway.kserve.front import Front
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.pools.connection import TlsFiles
from glm_image_gateway.pools.pool import Pool
from glm_image_gateway.pools.transport import PoolClient, PoolTransport
from glm_image_gateway.settings import GatewaySettings, SettingsError, grpc_endpoint
from glm_image_gateway.storage import Storage


@dataclass
class Services:
    """The parts of one gateway."""

    settings: GatewaySettings
    metrics: Metrics
    keys: Keys
    client: AsyncGlmImageClient
    pools: PoolTransport | None
    front: Front | None
    queue: FairQueue
    generator: Generator
    database: Database
    storage: Storage
    jobs: JobRunner
    started: int

    @classmethod
    def of(cls, settings: GatewaySettings) -> Services:
        """Makes the parts; the client connects with its first call.

        Raises:
            SettingsError: a file or folder cannot be used.
        """
        metrics, keys = Metrics(), Keys(settings.api_keys)
        pools = pools_of(settings, metrics) if settings.ar else None
        client = AsyncGlmImageClient(settings.url) if pools is None else PoolClient(pools)
        window = Window(settings.max_running, settings.window_seconds, settings.max_queue)
        queue = FairQueue(window if keys.are_required else None)
        metrics.running.set_function(lambda: queue.running)
        metrics.waiting.set_function(lambda: queue.waiting)
        generator = Generator(client, queue, metrics, settings.request_seconds)
        database = Database(settings.state_folder)
        storage = Storage(settings, database, metrics)
        jobs = JobRunner(settings, database, storage, generator, keys, metrics)
        front = None if pools is None else Front(pools, generator, keys)
        started = int(time.time())
        return cls(settings, metrics, keys, client, pools, front, queue, generator, database, storage, jobs, started)

    async def start(self) -> None:
        """Begins the work that goes on without requests."""
        if self.pools is not None:
            self.pools.start()
        self.storage.start()
        await self.jobs.start()

    async def close(self) -> None:
        await self.jobs.close()
        await self.storage.close()
        await self.client.close()
        await self.database.close()

    async def is_ready(self) -> bool:
        """Returns whether the server answers and all its models are ready."""
        return await self.client.server_ready()

    def model_name(self, name: object) -> str:
        """Returns a model's name as it was given; None = the first one.

        Raises:
            ApiError: the model has no such name.
        """
        aliases = self.settings.model_alias
        if name is None:
            return aliases[0]
        if name not in aliases:
            message = f"model is {shown(name)}; allowed: {', '.join(aliases)}"
            raise ApiError(404, message, "model_not_found", param="model")
        return str(name)

    async def read(self, request: Request) -> Read:
        """Returns the fields of a request's body, whose model is known."""
        read = await read_fields(request, self.settings.max_body_bytes)
        self.model_name(read.fields.get("model"))
        return read


def pools_of(settings: GatewaySettings, metrics: Metrics) -> PoolTransport:
    """Makes the pools of ``--ar`` and ``--dit``; raises ``SettingsError`` if a file of TLS cannot be read."""
    try:
        tls = TlsFiles.read(settings.tls_ca, settings.tls_cert, settings.tls_key)
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be read: {error.strerror}; allowed: a file in PEM") from error
    proxy = None if settings.proxy is None else grpc_endpoint("--proxy", settings.proxy)
    ar, dit = (
        Pool(
            stage,
            [grpc_endpoint(flag, url) for url in urls],
            metrics,
            tls=tls,
            proxy=proxy,
            max_waiting=settings.max_queue,
            max_failures=settings.max_retries,
            lost_seconds=settings.lost_seconds,
        )
        for stage, flag, urls in (("glm_ar", "--ar", settings.ar), ("glm_dit", "--dit", settings.dit))
    )
    return PoolTransport(ar, dit, settings.request_seconds)


def services_of(request: Request) -> Services:
    """Returns the parts of the gateway that a request came to."""
    return cast("Services", request.app.state.services)


def request_id_of(request: Request) -> str:
    """Returns a request's id, which is that of its request on the server too."""
    return cast("str", request.state.request_id)


def caller_of(request: Request) -> Caller:
    """Returns whom a request comes from; a dependency of every route that works.

    Raises:
        ApiError: the key is missing or unknown.
    """
    caller = services_of(request).keys.caller(request.headers.get("authorization"))
    request.state.caller = caller.name
    return caller


Authenticated = Annotated[Caller, Depends(caller_of)]
"""The caller of a route that needs a key."""

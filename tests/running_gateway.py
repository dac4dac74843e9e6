"""A gateway in this process, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from glm_image_gateway.server import GatewayServer
from glm_image_gateway.services import Services
from glm_image_gateway.settings import GatewaySettings

TIMEOUT_SECONDS = 120


@dataclass
class RunningGateway:
    services: Services
    client: httpx.Client
    grpc_port: int | None = None

    @property
    def url(self) -> str:
        return str(self.client.base_url)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        return self.services.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def running_gateway(url: str, store: Path | str, listen_port: int = 0, **settings: Any) -> Iterator[RunningGateway]:
    """Runs a gateway, by default on a free port; it has ended, with its requests, after the block.

    With ``url`` "" the settings have the addresses of pools.
    """
    place: dict[str, Any] = {"url": url} if url else {}
    started = threading.Event()
    state: dict[str, Any] = {}
    listener = socket.create_server(("127.0.0.1", listen_port))

    async def serve() -> None:
        services = Services.of(GatewaySettings(**place, port=0, store=str(store), drain_seconds=10, **settings))
        server = GatewayServer(services, listener)
        state.update(services=services, server=server, loop=asyncio.get_running_loop())
        serving = asyncio.ensure_future(server.serve([listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        started.set()
        await serving

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            started.set()

    thread = threading.Thread(target=run, name="gateway")
    thread.start()
    started.wait()
    try:
        with httpx.Client(base_url=state["server"].url, timeout=TIMEOUT_SECONDS) as client:
            yield RunningGateway(state["services"], client, state["server"].grpc_port)
    finally:
        state["loop"].call_soon_threadsafe(state["server"].request_stop)
        thread.join()
        listener.close()


def events_of(response: httpx.Response, *, comments: bool = False) -> Iterator[tuple[str | None, Any]]:
    """Yields the name and the data of each event; with ``comments``, None and the text of each comment too."""
    name: str | None = None
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            text = line.removeprefix("data: ")
            yield name, text if text == "[DONE]" else json.loads(text)
            name = None
        elif comments and line.startswith(":"):
            yield None, line


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]

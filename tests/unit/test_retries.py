"""Retries of both clients, against a real HTTP server that is busy for a set number of requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from glm_image_client import (
    AsyncGlmImageClient,
    BadArgumentError,
    BusyError,
    GenerationResult,
    GlmImageClient,
    Retries,
    UnreachableError,
)
from glm_image_client.errors import GlmImageClientError
from glm_image_client.retries import Attempts
from helpers import serving

QUICK = Retries(attempts=3, first_seconds=0.01, jitter=0)
OUTPUTS = [
    {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]},
    {"name": "images_base64", "datatype": "BYTES", "shape": [0], "data": []},
    {"name": "metadata", "datatype": "BYTES", "shape": [1], "data": ['{"seeds": [7]}']},
]


class BusyServer(ThreadingHTTPServer):
    """Answers the first ``busy`` requests with 503, the others with an image of one pixel."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.busy = 0
        self.requests = 0
        self.hang_up = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, BusyServer)
        self.rfile.read(int(self.headers["Content-Length"]))
        server.requests += 1
        busy = server.requests <= server.busy
        if busy and server.hang_up:
            return
        answer: dict[str, Any] = {"error": "the queue is full"} if busy else {"outputs": OUTPUTS}
        body = json.dumps(answer).encode()
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


@pytest.fixture
def server() -> Iterator[BusyServer]:
    with BusyServer() as made, serving(made):
        yield made


def ask(server: BusyServer, way: str, **options: Any) -> GenerationResult:
    if way == "sync":
        with GlmImageClient(server.url, **options) as client:
            return client.generate("x")

    async def wait() -> GenerationResult:
        async with AsyncGlmImageClient(server.url, **options) as client:
            return await client.generate("x")

    return asyncio.run(wait())


@pytest.mark.parametrize("way", ["sync", "asyncio"])
class TestBothClients:
    def test_busy_error_is_raised_without_retries_by_default(self, server: BusyServer, way: str) -> None:
        server.busy = 1
        with pytest.raises(BusyError, match=r"^the queue is full$") as failed:
            ask(server, way)
        assert (server.requests, failed.value.status) == (1, "UNAVAILABLE")

    def test_busy_server_is_retried(self, server: BusyServer, way: str) -> None:
        server.busy = 3
        assert ask(server, way, retries=QUICK).seeds == (7,)
        assert server.requests == 4

    def test_last_attempt_raises_its_error(self, server: BusyServer, way: str) -> None:
        server.busy = 9
        with pytest.raises(BusyError):
            ask(server, way, retries=QUICK)
        assert server.requests == 4

    def test_broken_connection_is_retried_only_if_configured(self, server: BusyServer, way: str) -> None:
        server.busy, server.hang_up = 1, True
        with pytest.raises(UnreachableError):
            ask(server, way, retries=QUICK)
        assert server.requests == 1
        server.busy = 2
        assert ask(server, way, retries=Retries(attempts=1, first_seconds=0, unreachable=True)).seeds == (7,)

    def test_pause_never_exceeds_the_timeout(self, server: BusyServer, way: str) -> None:
        server.busy = 9
        began = time.monotonic()
        with pytest.raises(BusyError):
            ask(server, way, timeout=20.0, retries=Retries(attempts=9, first_seconds=60, longest_seconds=60, jitter=0))
        assert time.monotonic() - began < 10
        assert server.requests == 1


class TestRetries:
    def test_pauses_grow_up_to_the_longest_pause(self) -> None:
        retries = Retries(first_seconds=0.5, factor=2, longest_seconds=3, jitter=0)
        assert [retries.pause(index) for index in (0, 1, 2, 3, 10**6)] == [0.5, 1, 2, 3, 3]

    def test_jitter_shortens_pauses(self) -> None:
        pauses = [Retries(first_seconds=8, jitter=0.25).pause(0) for _ in range(200)]
        assert all(6 <= pause <= 8 for pause in pauses)
        assert max(pauses) - min(pauses) > 1

    @pytest.mark.parametrize(
        "values",
        [
            {"attempts": -1},
            {"first_seconds": -0.1},
            {"factor": 0.5},
            {"jitter": 1.5},
            {"longest_seconds": float("nan")},
        ],
    )
    def test_values_out_of_range_are_refused_by_name(self, values: dict[str, float]) -> None:
        (name,) = values
        with pytest.raises(BadArgumentError, match=f"^{name} is .*; allowed: "):
            Retries(**values)  # type: ignore[arg-type]

    def test_other_errors_are_not_retried(self) -> None:
        error = GlmImageClientError("no")
        with pytest.raises(GlmImageClientError) as raised:
            Attempts(Retries(), None).pause_after(error)
        assert raised.value is error

    def test_attempt_has_the_remaining_time(self) -> None:
        attempts = Attempts(QUICK, 100.0)
        assert attempts.timeout == 100.0
        attempts.pause_after(BusyError("full", "UNAVAILABLE"))
        assert attempts.timeout is not None
        assert 90 < attempts.timeout < 100

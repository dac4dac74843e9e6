"""Sends requests to a server at a fixed concurrency or rate, with perf_analyzer or from this process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import report

from glm_image_client import AsyncGlmImageClient, GenerationResult, GlmImageClientError

MODEL = "glm_image"
Values = dict[str, Any]
Send = Callable[[AsyncGlmImageClient, int], Awaitable[GenerationResult]]
"""Sends a request of its own for each number."""


@dataclass(frozen=True)
class Level:
    """A load: ``requests`` in all; ``mode`` is ``concurrency`` (requests in flight) or ``rate`` (requests a second)."""

    mode: str
    value: float
    requests: int


@dataclass(frozen=True)
class Response:
    """The outcome of one request.

    Attributes:
        sent: seconds on a clock of the driver's.
        received: likewise.
        error: the message of its error; None if it succeeded.
        metadata: of the response.
    """

    sent: float
    received: float
    error: str | None
    metadata: Values

    @property
    def seconds(self) -> float:
        """The request's latency."""
        return self.received - self.sent


def read_input_data(path: Path) -> list[Values]:
    """Reads perf_analyzer's ``--input-data``: a list of requests under ``data``, each value in a list."""
    return [{name: values[0] for name, values in row.items()} for row in json.loads(path.read_text())["data"]]


def write_input_data(path: Path, requests: Sequence[Values]) -> Path:
    path.write_text(json.dumps({"data": [{name: [value] for name, value in row.items()} for row in requests]}))
    return path


def find_perf_analyzer() -> str | None:
    """Returns the program that PERF_ANALYZER names, else the one on PATH."""
    return shutil.which(os.environ.get("PERF_ANALYZER") or "perf_analyzer")


def perf_analyzer(program: str, url: str, protocol: str, requests: Sequence[Values], level: Level) -> list[Response]:
    """Sends the requests in turn with perf_analyzer; raises SystemExit if it fails."""
    load = (
        ["--concurrency-range", str(int(level.value))]
        if level.mode == "concurrency"
        else ["--request-rate-range", str(level.value)]
    )
    with tempfile.TemporaryDirectory() as scratch:
        data, export = write_input_data(Path(scratch, "data.json"), requests), Path(scratch, "export.json")
        ended = subprocess.run(
            [
                *(program, "-m", MODEL, "-i", protocol, "-u", url, "--input-data", str(data), *load),
                *("--request-count", str(level.requests), "--profile-export-file", str(export)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode or not export.is_file():
            raise SystemExit(f"perf_analyzer ended with code {ended.returncode}: {ended.stdout}{ended.stderr}")
        (experiment,) = json.loads(export.read_text())["experiments"]
    return [_exported(request) for request in experiment["requests"]]


def _exported(request: Values) -> Response:
    sent = request["timestamp"] / 1e9
    if not request.get("response_timestamps"):
        return Response(sent, sent, "no response", {})
    # perf_analyzer exports a BYTES output as it was received: its length in four bytes, then its text.
    text = request["response_outputs"][0]["metadata"]
    return Response(sent, request["response_timestamps"][-1] / 1e9, None, json.loads(text[text.index("{") :]))


def own_load(url: str, protocol: str, requests: Sequence[Values], level: Level) -> list[Response]:
    """Sends the requests in turn from this process."""
    return asyncio.run(_own_load(f"{protocol}://{url}", requests, level))


async def _own_load(url: str, requests: Sequence[Values], level: Level) -> list[Response]:
    in_flight = asyncio.Semaphore(int(level.value) if level.mode == "concurrency" else level.requests)
    started = time.monotonic()

    async def send(client: AsyncGlmImageClient, index: int) -> Response:
        if level.mode == "rate":
            await asyncio.sleep(max(0.0, started + index / level.value - time.monotonic()))
        async with in_flight:
            return await response_to(client.generate(**requests[index % len(requests)]))

    async with AsyncGlmImageClient(url) as client:
        return await asyncio.gather(*(send(client, index) for index in range(level.requests)))


async def response_to(request: Awaitable[GenerationResult]) -> Response:
    """Waits for the response to a request."""
    sent = time.monotonic()
    try:
        result = await request
    except GlmImageClientError as error:
        return Response(sent, time.monotonic(), str(error), {})
    return Response(sent, time.monotonic(), None, dict(result.metadata.raw))


def steady_load(url: str, send: Send, concurrency: int, count: int) -> list[Response]:
    """Keeps requests in flight until ``count`` responses have come, and abandons the rest; in the order of arrival.

    Reports each response when it comes, so that an interrupted run shows its progress. An error ends the load.
    """
    return asyncio.run(_steady_load(url, send, concurrency, count))


async def _steady_load(url: str, send: Send, concurrency: int, count: int) -> list[Response]:
    responses = asyncio.Queue[Response]()

    async def keep_sending(client: AsyncGlmImageClient, first: int) -> None:
        for seed in range(first, first + count):
            response = await response_to(send(client, seed))
            await responses.put(response)
            if response.error:
                return

    async with AsyncGlmImageClient(url) as client:
        senders = [asyncio.create_task(keep_sending(client, index * count)) for index in range(concurrency)]
        received: list[Response] = []
        started = time.monotonic()
        while len(received) < count and not (received and received[-1].error):
            received.append(response := await responses.get())
            since_start = response.received - started
            report(
                "answered",
                number=len(received),
                since_start=since_start,
                seconds=response.seconds,
                error=response.error,
            )
        for task in senders:
            task.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
    return received


def has_failed(responses: Sequence[Response]) -> bool:
    """Reports the errors, if there are any."""
    errors = [response.error for response in responses if response.error]
    if errors:
        report("failed", requests=len(errors), errors=sorted(set(errors)))
    return bool(errors)


def steady_rate(responses: Sequence[Response]) -> float:
    """Returns the images a second of a steady stream: the slope of a line fitted to the responses' times.

    Instances of different speed need not have responded equally recently when the stream ends, to which a fitted line
    is little sensitive.
    """
    return float(np.polyfit([response.received for response in responses], np.arange(len(responses)), 1)[0])

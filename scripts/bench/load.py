"""Requests sent to a server at a fixed concurrency or rate, by perf_analyzer or from this process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import say

from glm_image_client import AsyncGlmImageClient, GenerationResult, GlmImageClientError

MODEL = "glm_image"
Values = dict[str, Any]
Ask = Callable[[AsyncGlmImageClient, int], Awaitable[GenerationResult]]
"""Sends a request of its own for each number."""


@dataclass(frozen=True)
class Level:
    """How many requests are sent, and how: ``mode`` is ``concurrency`` (in flight at once) or ``rate`` (a second)."""

    mode: str
    value: float
    requests: int


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent and answered, in seconds; what went wrong, if anything; the answer's metadata."""

    sent: float
    answered: float
    error: str | None
    metadata: Values

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.answered - self.sent


def read_input_data(path: Path) -> list[Values]:
    """Reads perf_analyzer's ``--input-data``: a list of requests under ``data``, each value in a list."""
    return [{name: values[0] for name, values in one.items()} for one in json.loads(path.read_text())["data"]]


def write_input_data(path: Path, requests: list[Values]) -> Path:
    path.write_text(json.dumps({"data": [{name: [value] for name, value in one.items()} for one in requests]}))
    return path


def find_perf_analyzer() -> str | None:
    """The program that PERF_ANALYZER names, else the one on PATH."""
    return shutil.which(os.environ.get("PERF_ANALYZER") or "perf_analyzer")


def perf_analyzer(program: str, url: str, protocol: str, requests: list[Values], level: Level) -> list[Answered]:
    """Sends the requests in turn with perf_analyzer; its end with an error is that of the benchmark."""
    how = (
        ["--concurrency-range", str(int(level.value))]
        if level.mode == "concurrency"
        else ["--request-rate-range", str(level.value)]
    )
    with tempfile.TemporaryDirectory() as scratch:
        data, export = write_input_data(Path(scratch, "data.json"), requests), Path(scratch, "export.json")
        ended = subprocess.run(
            [
                *(program, "-m", MODEL, "-i", protocol, "-u", url, "--input-data", data, *how),
                *("--request-count", str(level.requests), "--profile-export-file", export),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode or not export.is_file():
            raise SystemExit(f"perf_analyzer ended with code {ended.returncode}: {ended.stdout}{ended.stderr}")
        (experiment,) = json.loads(export.read_text())["experiments"]
    return [_exported(request) for request in experiment["requests"]]


def _exported(request: Values) -> Answered:
    sent = request["timestamp"] / 1e9
    if not request.get("response_timestamps"):
        return Answered(sent, sent, "no response", {})
    # A BYTES output stands there as it came: its length in four bytes, then its text.
    text = request["response_outputs"][0]["metadata"]
    return Answered(sent, request["response_timestamps"][-1] / 1e9, None, json.loads(text[text.index("{") :]))


def own_load(url: str, protocol: str, requests: list[Values], level: Level) -> list[Answered]:
    """Sends the requests in turn from this process."""
    return asyncio.run(_own_load(f"{protocol}://{url}", requests, level))


async def _own_load(url: str, requests: list[Values], level: Level) -> list[Answered]:
    in_flight = asyncio.Semaphore(int(level.value) if level.mode == "concurrency" else level.requests)
    began = time.monotonic()

    async def ask(client: AsyncGlmImageClient, index: int) -> Answered:
        if level.mode == "rate":
            await asyncio.sleep(max(0.0, began + index / level.value - time.monotonic()))
        async with in_flight:
            return await answered(client.generate(**requests[index % len(requests)]))

    async with AsyncGlmImageClient(url) as client:
        return await asyncio.gather(*(ask(client, index) for index in range(level.requests)))


async def answered(asking: Awaitable[GenerationResult]) -> Answered:
    """Waits for a request's answer."""
    sent = time.monotonic()
    try:
        result = await asking
    except GlmImageClientError as error:
        return Answered(sent, time.monotonic(), str(error), {})
    return Answered(sent, time.monotonic(), None, dict(result.metadata.raw))


def steady_load(url: str, ask: Ask, concurrency: int, wanted: int) -> list[Answered]:
    """Keeps requests in flight until so many are answered, and gives the rest up; in the order of the answers.

    Says when each came, so that a stream that is cut off still tells how far it got. An error ends it.
    """
    return asyncio.run(_steady_load(url, ask, concurrency, wanted))


async def _steady_load(url: str, ask: Ask, concurrency: int, wanted: int) -> list[Answered]:
    answers = asyncio.Queue[Answered]()

    async def keep_asking(client: AsyncGlmImageClient, first: int) -> None:
        for seed in range(first, first + wanted):
            one = await answered(ask(client, seed))
            await answers.put(one)
            if one.error:
                return

    async with AsyncGlmImageClient(url) as client:
        asking = [asyncio.create_task(keep_asking(client, index * wanted)) for index in range(concurrency)]
        got: list[Answered] = []
        began = time.monotonic()
        while len(got) < wanted and not (got and got[-1].error):
            got.append(one := await answers.get())
            since_start = one.answered - began
            say("answered", number=len(got), since_start=since_start, seconds=one.seconds, error=one.error)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    return got


def has_failed(answers: list[Answered]) -> bool:
    """Says what went wrong, if anything."""
    errors = [one.error for one in answers if one.error]
    if errors:
        say("failed", requests=len(errors), errors=sorted(set(errors)))
    return bool(errors)


def steady_rate(answers: list[Answered]) -> float:
    """Returns the pictures a second of a steady stream: the slope of a line through how many had come by when.

    Several painters, each at its own pace, need not have answered equally lately when it ends; a line hardly minds.
    """
    return float(np.polyfit([one.answered for one in answers], np.arange(len(answers)), 1)[0])

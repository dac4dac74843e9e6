"""Requests sent to a server at a fixed concurrency or rate, by perf_analyzer or from this process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_image_client import AsyncGlmImageClient, GlmImageClientError

MODEL = "glm_image"
Values = dict[str, Any]


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
            sent = time.monotonic()
            try:
                result = await client.generate(**requests[index % len(requests)])
            except GlmImageClientError as error:
                return Answered(sent, time.monotonic(), str(error), {})
            return Answered(sent, time.monotonic(), None, dict(result.metadata.raw))

    async with AsyncGlmImageClient(url) as client:
        return await asyncio.gather(*(ask(client, index) for index in range(level.requests)))

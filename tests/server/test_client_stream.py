"""``stream()`` of both clients and the command, against a real server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glm_image.supervisor import TritonServer
from glm_image_client import (
    AsyncGlmImageClient,
    GlmImageClient,
    RefusedError,
    RequestCancelled,
    RequestTimeout,
    StreamEvent,
)
from helpers import wait_until
from server.streaming import final_state

OPTIONS: dict[str, Any] = {"prompt": "A fox", "height": 96, "width": 64, "num_inference_steps": 5, "seed": 11}
SLOW: dict[str, Any] = {**OPTIONS, "height": 256, "width": 256, "num_inference_steps": 200}
COMMAND = "from glm_image_client.cli import main; main()"
PROTOCOLS = ("grpc", "http")


def url(server: TritonServer, protocol: str) -> str:
    return f"{protocol}://{server.grpc_url if protocol == 'grpc' else server.http_url}"


def client_of(server: TritonServer, protocol: str, **options: Any) -> GlmImageClient:
    return GlmImageClient(url(server, protocol), **options)


def check(events: list[StreamEvent], expected: bytes, request_id: str) -> None:
    assert [event.result is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert {event.request_id for event in events} == {request_id}
    assert events[-1].result is not None
    assert events[-1].result.encoded == [expected]
    assert events[-1].images[0].size == (64, 96)


@pytest.mark.parametrize("protocol", ["grpc", pytest.param("http", marks=pytest.mark.full)])
def test_the_events_end_with_the_images_of_generate(triton: TritonServer, protocol: str) -> None:
    with client_of(triton, protocol) as client:
        (expected,) = client.generate(**OPTIONS).encoded
        check(list(client.stream(**OPTIONS, request_id="mine", preview_every=2)), expected, "mine")

    async def collect() -> list[StreamEvent]:
        async with AsyncGlmImageClient(url(triton, protocol)) as client:
            return [event async for event in client.stream(**OPTIONS, request_id="ours")]

    check(asyncio.run(collect()), expected, "ours")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_leaving_the_iteration_cancels(triton: TritonServer, protocol: str) -> None:
    with client_of(triton, protocol) as client:
        for event in client.stream(**SLOW, request_id=f"left {protocol}"):
            if event.kind in {"decode", "denoise"}:
                break
        assert final_state(client, f"left {protocol}") == "cancelled"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cancelling_the_task_leaves_the_iteration(triton: TritonServer, protocol: str) -> None:
    async def leave(request_id: str) -> None:
        async with AsyncGlmImageClient(url(triton, protocol)) as client:

            async def follow() -> None:
                async for _ in client.stream(**SLOW, request_id=request_id):
                    began.set()

            began = asyncio.Event()
            task = asyncio.create_task(follow())
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave(f"task {protocol}"))
    with client_of(triton, protocol) as client:
        assert final_state(client, f"task {protocol}") == "cancelled"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_asyncio_client_raises_the_servers_errors(triton: TritonServer, protocol: str) -> None:
    async def refused() -> None:
        async with AsyncGlmImageClient(url(triton, protocol)) as client:
            async for _ in client.stream(**{**OPTIONS, "height": 1}):
                pass

    with pytest.raises(RefusedError, match="height is 1; allowed: 32 to 2048"):
        asyncio.run(refused())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_errors_are_those_of_generate(triton: TritonServer, protocol: str) -> None:
    with client_of(triton, protocol) as client:
        with pytest.raises(RefusedError, match="height is 1; allowed: 32 to 2048"):
            list(client.stream(**{**OPTIONS, "height": 1}))
        with pytest.raises(RequestTimeout):
            list(client.stream(**SLOW, timeout=0.3))
        events = client.stream(**SLOW, request_id=f"stopped {protocol}")
        next(events)
        assert wait_until(lambda: client.cancel(f"stopped {protocol}")["state"] != "unknown")
        with pytest.raises(RequestCancelled, match="was cancelled"):
            list(events)


def test_the_command_writes_the_intermediate_images(triton: TritonServer, tmp_path: Path) -> None:
    previews = tmp_path / "previews"
    previews.mkdir()
    arguments = ["A fox", "--size", "256x256", "--steps", "25", "--seed", "5", "--preview-dir", str(previews)]
    command = [sys.executable, "-c", COMMAND, "generate", *arguments, "-o", str(tmp_path / "out.png")]
    done = subprocess.run([*command, "--url", triton.grpc_url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in sorted(previews.iterdir())] == ["00_denoise.png", "01_denoise.png"]
    with GlmImageClient(triton.grpc_url) as client:
        plain = client.generate("A fox", width=256, height=256, num_inference_steps=25, seed=5, file_metadata="full")
    assert (tmp_path / "out.png").read_bytes() == plain.encoded[0]

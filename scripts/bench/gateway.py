#!/usr/bin/env python3
"""Measures what the gateway adds to requests, and its memory. Prints JSON lines.

The server is a real Triton whose model answers immediately with a PNG of 3 MB, or holds its requests. The same requests
are sent in turns to Triton, over gRPC and over HTTP, and to the gateway, over connections that stay open. Then the
gateway has idle connections and waiting requests at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx
from measure import parse, report
from servers import PROC, resident_bytes

from glm_image.supervisor import ServerSettings, TritonServer
from glm_image_client import GlmImageClient

BRIEF = {"requests": 10, "idle": 20, "waiting": 4}
WARM_UP = 3
SECONDS = 300
GENERATIONS = "/v1/images/generations"

CONFIG = """
backend: "python"
max_batch_size: 0
input [
  { name: "prompt" data_type: TYPE_STRING dims: [1] },
  { name: "num_images" data_type: TYPE_INT32 dims: [1] optional: true },
  { name: "output_format" data_type: TYPE_STRING dims: [1] optional: true }
]
output [
  { name: "images" data_type: TYPE_UINT8 dims: [-1, -1, -1, 3] },
  { name: "images_base64" data_type: TYPE_STRING dims: [-1] },
  { name: "metadata" data_type: TYPE_STRING dims: [1] }
]
instance_group [{ count: 1 kind: KIND_CPU }]
"""

MODEL = """
import base64, io, json, time
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

METADATA = {
    "version": "0", "seeds": [1], "width": 1024, "height": 1024, "steps": 50, "cached_steps": [0],
    "tokens": {"prompt": 1, "source": 0, "preview": 0, "image": 1}, "seconds": {},
}


class TritonPythonModel:
    def initialize(self, args):
        noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "png", compress_level=1)
        self.file = base64.b64encode(file.getvalue())

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        prompt = pb_utils.get_input_tensor_by_name(request, "prompt").as_numpy()[0].decode()
        if prompt.startswith("hold "):
            while not Path(prompt.removeprefix("hold ")).exists():
                time.sleep(0.02)
        outputs = {
            "images": np.zeros((0, 0, 0, 3), np.uint8),
            "images_base64": np.array([self.file], dtype=object),
            "metadata": np.array([json.dumps(METADATA).encode()], dtype=object),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gateway.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100, help="of each way (%(default)s)")
    parser.add_argument("--idle", type=int, default=500, help="idle connections (%(default)s)")
    parser.add_argument("--waiting", type=int, default=64, help="requests that wait (%(default)s)")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(fast_server(folder))
        process, url = stack.enter_context(gateway(server, folder))
        measure_overhead(server, url, flags.requests)
        asyncio.run(measure_memory(process, url, folder, flags.idle, flags.waiting))
    return 0


@contextmanager
def fast_server(folder: Path) -> Iterator[TritonServer]:
    """Runs a Triton whose model ``glm_image`` answers immediately."""
    (folder / "models" / "glm_image" / "1").mkdir(parents=True)
    (folder / "models" / "glm_image" / "config.pbtxt").write_text(CONFIG)
    (folder / "models" / "glm_image" / "1" / "model.py").write_text(MODEL)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "model_index.json").write_text("{}")
    with TritonServer(
        ServerSettings(folder / "checkpoint", model_repository=folder / "models", drain_seconds=1)
    ) as server:
        yield server


@contextmanager
def gateway(server: TritonServer, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs a gateway in front of a server; yields its process and its address."""
    command = [sys.executable, "-m", "glm_image_gateway", "--url", f"grpc://{server.grpc_url}", "--port", "0"]
    command += ["--store", str(folder / "store"), "--stop-at-eof"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[1]
        process.communicate()


def measure_overhead(server: TritonServer, url: str, requests: int) -> None:
    """Sends the same requests to Triton, over both protocols, and to the gateway, in turns."""
    seconds: dict[str, list[float]] = {"triton_grpc": [], "triton_http": [], "gateway": []}
    with ExitStack() as stack:
        client = stack.enter_context(GlmImageClient(server.grpc_url))
        triton, http = (
            stack.enter_context(closing(HTTPConnection(address, timeout=SECONDS)))
            for address in (server.http_url, url.removeprefix("http://"))
        )
        ways: dict[str, Callable[[], bytes]] = {
            "triton_grpc": lambda: client.generate("x", num_images=1).base64_files[0],
            "triton_http": lambda: posted(triton, "/v2/models/glm_image/generate"),
            "gateway": lambda: posted(http, GENERATIONS),
        }
        for turn in range(WARM_UP + requests):
            answers = {}
            for way, send in ways.items():
                started = time.perf_counter()
                answers[way] = send()
                if turn >= WARM_UP:
                    seconds[way].append(time.perf_counter() - started)
            file = answers["triton_grpc"]
            assert file in answers["gateway"]
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    added = {f"added_to_{way}": medians["gateway"] - medians[way] for way in ("triton_grpc", "triton_http")}
    figures = {f"{name}_p50_seconds": value for name, value in {**medians, **added}.items()}
    report("overhead", **figures, base64_bytes=len(file), requests=requests)


def posted(connection: HTTPConnection, path: str) -> bytes:
    """Sends a request over a connection that stays open, and returns the body of its answer."""
    connection.request("POST", path, b'{"prompt": "x"}', {"content-type": "application/json"})
    response = connection.getresponse()
    body = response.read()
    assert response.status == httpx.codes.OK, body
    return body


async def measure_memory(process: subprocess.Popen[str], url: str, folder: Path, idle: int, waiting: int) -> None:
    """Reports the gateway's resident memory with idle connections and waiting requests, and the peak afterwards."""
    alone, go = resident_bytes(process.pid), folder / "go"
    address = (httpx.URL(url).host, httpx.URL(url).port or 80)
    limits = httpx.Limits(max_connections=None)
    with ExitStack() as stack:
        for _ in range(idle):
            stack.enter_context(socket.create_connection(address))
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
            body = {"prompt": f"hold {go}"}
            sent = [asyncio.ensure_future(_status(client, body)) for _ in range(waiting)]
            while await _running(client) < waiting:
                await asyncio.sleep(0.02)
            resident = resident_bytes(process.pid)
            go.touch()
            statuses = await asyncio.gather(*sent)
    peak = int(re.findall(r"VmHWM:\s+(\d+)", (PROC / str(process.pid) / "status").read_text())[0]) * 1024
    report(
        "memory", idle_connections=idle, waiting_requests=waiting, resident_bytes=resident, resident_bytes_alone=alone,
        peak_bytes=peak, failed=sum(status != httpx.codes.OK for status in statuses),
    )  # fmt: skip


async def _status(client: httpx.AsyncClient, body: dict[str, str]) -> int:
    async with client.stream("POST", GENERATIONS, json=body) as response:
        async for _ in response.aiter_raw():
            pass
        return response.status_code


async def _running(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    return float(re.findall(r"^glm_image_gateway_running_requests (\S+)$", text, re.MULTILINE)[0])


if __name__ == "__main__":
    sys.exit(main())

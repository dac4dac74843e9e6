#!/usr/bin/env python3
"""Sends many small requests from several clients over both protocols, and follows the memory of every process.

    soak.py [--checkpoint DIR] [--requests 1000] [--clients 8] [--round 100]

Each request is first made alone; later answers must equal it. Prints a JSON object for each round: how many answers
came so far, how many of them were wrong, and the resident bytes of every process between rounds, when nothing is in
flight. The code is 1 when an answer was wrong or missing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from glm_image.supervisor import ServerSettings, TritonServer

Values = dict[str, Any]

ANSWER_SECONDS = 300
DATATYPES = {"guidance_scale": ("FP32", np.float32), "seed": ("INT64", np.int64)}
SIZES = [(32, 32), (32, 64), (64, 32), (64, 64), (33, 65), (96, 64), (64, 96), (50, 50)]
PROMPTS = ["a fox", "a sign that says 'open'", "雪", "two words \"a\" and 'b', at night"]
REQUESTS: list[Values] = [
    {
        "prompt": PROMPTS[index % len(PROMPTS)],
        "height": height,
        "width": width,
        "num_inference_steps": 1 + index % 2,
        "guidance_scale": (1.0, 1.5, 4.0)[index % 3],
        "seed": index,
        "output_format": output_format,
    }
    for index, ((height, width), output_format) in enumerate(itertools.product(SIZES, ("raw", "png")))
]


@dataclass(frozen=True)
class Round:
    """The state between rounds.

    Attributes:
        answered: requests so far.
        wrong: answers so far that were errors, or not the picture that was made alone.
        seconds: since the first round began.
        resident_bytes: by process: tritonserver, and each model's.
        shared_memory_bytes: of the server's regions in /dev/shm.
    """

    answered: int
    wrong: int
    seconds: float
    resident_bytes: dict[str, int]
    shared_memory_bytes: int


def processes(server: TritonServer) -> dict[str, int]:
    """Returns the process ids of tritonserver and of each model's instances, by name."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            arguments = (folder / "cmdline").read_text().split("\0")
            if not any(server.shm_prefix in argument for argument in arguments):
                continue
            if arguments[0].endswith("/tritonserver"):
                found["tritonserver"] = int(folder.name)
            elif arguments[0].endswith("/triton_python_backend_stub"):
                model = Path(arguments[1]).parents[1].name
                found[model if model not in found else f"{model} {folder.name}"] = int(folder.name)
    return dict(sorted(found.items()))


def resident_bytes(pid: int) -> int:
    """Returns what a process holds in memory, parts shared with others included."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def shared_memory_bytes(server: TritonServer) -> int:
    """Returns what a server's regions in /dev/shm hold."""
    return sum(region.stat().st_blocks * 512 for region in Path("/dev/shm").glob(f"{server.shm_prefix}*"))


class Client:
    """One connection over each protocol; not for two threads."""

    def __init__(self, server: TritonServer) -> None:
        self._grpc = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        self._http = tritonclient.http.InferenceServerClient(server.http_url, network_timeout=ANSWER_SECONDS)

    def digest(self, values: Values, protocol: Any) -> str:
        """Asks for a picture and returns what identifies it."""
        client = self._grpc if protocol is tritonclient.grpc else self._http
        inputs = []
        for name, value in values.items():
            datatype, numpy_type = DATATYPES.get(name, ("INT32", np.int32))
            if isinstance(value, str):
                datatype, array = "BYTES", np.array([value.encode()], dtype=object)
            else:
                array = np.array([value], dtype=numpy_type)
            inputs.append(protocol.InferInput(name, [1], datatype))
            inputs[-1].set_data_from_numpy(array)
        answer = client.infer("glm_image", inputs)
        pixels, files = answer.as_numpy("images"), answer.as_numpy("images_base64")
        told = json.loads(answer.as_numpy("metadata")[0])
        content = repr((pixels.shape, told["seeds"], told["width"], told["height"])).encode()
        return hashlib.sha256(content + pixels.tobytes() + b"".join(files.tolist())).hexdigest()


def soak(server: TritonServer, requests: int, clients: int, size_of_round: int) -> Iterator[Round]:
    """Sends ``REQUESTS`` over and over from ``clients`` threads; yields after each round of ``size_of_round``."""
    alone = [Client(server).digest(values, tritonclient.grpc) for values in REQUESTS]
    own = local()

    def is_right(index: int) -> bool:
        if not hasattr(own, "client"):
            own.client = Client(server)
        # Shifted by one every time through the requests, so that each one goes both ways.
        protocol = (tritonclient.grpc, tritonclient.http)[(index + index // len(REQUESTS)) % 2]
        which = index % len(REQUESTS)
        try:
            return bool(own.client.digest(REQUESTS[which], protocol) == alone[which])
        except Exception as error:
            print(f"request {index}: {error}", file=sys.stderr, flush=True)
            return False

    pids = processes(server)
    began, wrong = time.monotonic(), 0
    with ThreadPoolExecutor(clients) as pool:
        for first in range(0, requests, size_of_round):
            answered = min(first + size_of_round, requests)
            wrong += sum(not right for right in pool.map(is_right, range(first, answered)))
            memory = {name: resident_bytes(pid) for name, pid in pids.items()}
            yield Round(answered, wrong, round(time.monotonic() - began, 3), memory, shared_memory_bytes(server))


def main() -> int:
    parser = argparse.ArgumentParser(description="Sends many small requests and follows the memory of every process.")
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one of random weights")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--round", type=int, default=100, help="requests between two looks at the memory")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = flags.checkpoint or tiny_checkpoint(Path(folder))
        with TritonServer(ServerSettings(checkpoint)) as server:
            for done in soak(server, flags.requests, flags.clients, flags.round):
                print(json.dumps(asdict(done)), flush=True)
    return 1 if done.wrong or done.answered != flags.requests else 0


def tiny_checkpoint(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from make_tiny_checkpoint import make_tiny_checkpoint  # noqa: PLC0415

    return make_tiny_checkpoint(folder / "tiny")


if __name__ == "__main__":
    sys.exit(main())

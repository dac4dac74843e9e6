#!/usr/bin/env python3
"""Sends many small requests from several clients over both protocols, and reports every process's memory.

    scripts/bench/soak.py [--checkpoint DIR] [--requests 1000] [--clients 8] [--round 50]

Each of 16 requests is first sent alone; later responses must equal that one. Prints a JSON line for each round: the
number of responses so far, how many of them were wrong, and the resident bytes of every process between rounds, when
nothing is in flight. The exit code is 1 if a response was wrong or missing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from ceilings import report_ceilings_of
from measure import new_parser, parse, report
from servers import processes, resident_bytes, shared_memory_bytes, tiny_checkpoint

from glm_image.supervisor import ServerSettings, TritonServer

Values = dict[str, Any]

RESPONSE_SECONDS = 300
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
        wrong: responses so far that were errors, or not the image of the request sent alone.
        seconds: since the first round began.
        resident_bytes: by process: tritonserver, and that of each model.
        shared_memory_bytes: of the server's regions in /dev/shm.
    """

    answered: int
    wrong: int
    seconds: float
    resident_bytes: dict[str, int]
    shared_memory_bytes: int


class Client:
    """One connection over each protocol; not thread-safe."""

    def __init__(self, server: TritonServer) -> None:
        self._grpc = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        self._http = tritonclient.http.InferenceServerClient(server.http_url, network_timeout=RESPONSE_SECONDS)

    def digest(self, values: Values, protocol: Any) -> str:
        """Sends a request and returns a hash of the response."""
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
        response = client.infer("glm_image", inputs)
        pixels, files = response.as_numpy("images"), response.as_numpy("images_base64")
        metadata = json.loads(response.as_numpy("metadata")[0])
        content = repr((pixels.shape, metadata["seeds"], metadata["width"], metadata["height"])).encode()
        return hashlib.sha256(content + pixels.tobytes() + b"".join(files.tolist())).hexdigest()


def soak(server: TritonServer, requests: int, clients: int, round_size: int) -> Iterator[Round]:
    """Sends ``REQUESTS`` over and over from ``clients`` threads; yields after each round of ``round_size``."""
    alone = [Client(server).digest(values, tritonclient.grpc) for values in REQUESTS]
    thread = local()

    def is_correct(index: int) -> bool:
        if not hasattr(thread, "client"):
            thread.client = Client(server)
        # Shifted by one in every pass over the requests, so that each is sent over both protocols.
        protocol = (tritonclient.grpc, tritonclient.http)[(index + index // len(REQUESTS)) % 2]
        request = index % len(REQUESTS)
        try:
            return bool(thread.client.digest(REQUESTS[request], protocol) == alone[request])
        except Exception as error:
            print(f"request {index}: {error}", file=sys.stderr, flush=True)
            return False

    pids = processes(server)
    began, wrong = time.monotonic(), 0
    with ThreadPoolExecutor(clients) as pool:
        for first in range(0, requests, round_size):
            answered = min(first + round_size, requests)
            wrong += sum(not correct for correct in pool.map(is_correct, range(first, answered)))
            memory = {name: resident_bytes(pid) for name, pid in pids.items()}
            yield Round(answered, wrong, round(time.monotonic() - began, 3), memory, shared_memory_bytes(server))


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report_ceilings_of("auto", brief=flags.brief)
        checkpoint = tiny_checkpoint(Path(folder)) if flags.checkpoint is None else flags.checkpoint
        with TritonServer(ServerSettings(checkpoint)) as server:
            return measure(server, flags)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser("soak.py", __doc__)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--requests", type=int, default=1000, help="in all (%(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="threads that send them (%(default)s)")
    parser.add_argument("--round", type=int, default=50, help="requests between two reports (%(default)s)")
    return parse(parser, arguments, {"requests": 16, "round": 8})


def measure(server: TritonServer, flags: argparse.Namespace) -> int:
    """Reports each round; returns the exit code."""
    report("soak", requests=flags.requests, clients=flags.clients, different=len(REQUESTS))
    for done in soak(server, flags.requests, flags.clients, flags.round):
        report("round", **asdict(done))
    return 1 if done.wrong or done.answered != flags.requests else 0


if __name__ == "__main__":
    sys.exit(main())

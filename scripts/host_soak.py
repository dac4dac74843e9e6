#!/usr/bin/env python3
"""Runs a server on a host that is at fault in every way, and checks its images and its use of resources.

    host_soak.py [--checkpoint DIR] [--seconds 600] [--images 500] [--clients 4] [--idle 2000]

All the time the checkpoint, the model repository and the temporary folder have names of Chinese characters, spaces and
quotes, no locale is set, the log and the request log have no reader, the soft limit of open files is 1024, and many
connections are idle. Meanwhile requests that are refused fill the logs, ``serve`` is stopped and continued (SIGSTOP,
SIGCONT), connections come and go, and the files of the run directory are removed.

Each image must equal the one that was generated first for its request, byte for byte. The memory, the open files and
the threads of every process and the size of /dev/shm must not grow between the second and the last third of the run. At
the end SIGTERM must stop the server, which leaves nothing behind.

Prints the results as a JSON object, and faults to standard error. The exit code is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tritonclient.grpc
import tritonclient.http

from glm_image.supervisor.run_directory import PREFIX
from glm_image.supervisor.settings import default_model_repository
from glm_image.watchdog.leftovers import SHARED_MEMORY

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from servers import descendants, resident_bytes, tiny_checkpoint
from soak import REQUESTS, Client

NAME = "中文 a 'b' \"c\""
USUAL_SOFT_LIMIT = 1024
READY_SECONDS, END_SECONDS, REQUEST_SECONDS = 300.0, 90.0, 300.0
ROUND_SECONDS = 5.0
CHURN, REFUSALS = 100, 20
"""Connections that come and go, and requests that are refused, in each round."""

MEBIBYTE = 1 << 20
GROWTH = {"resident": 32 * MEBIBYTE, "descriptors": 16, "threads": 8, "shared_memory": 16 * MEBIBYTE}
"""The largest growth of each resource from the second to the last third of the run."""


@dataclass(frozen=True)
class Urls:
    """The addresses of a server."""

    http_url: str
    grpc_url: str


@dataclass
class Report:
    """The results of a run."""

    images: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def growth(self) -> dict[str, float]:
        """Returns the difference of each resource's medians in the last and the second third."""
        third = len(self.samples) // 3
        if not third:
            return {}
        return {
            name: statistics.median(sample[name] for sample in self.samples[2 * third :])
            - statistics.median(sample[name] for sample in self.samples[third : 2 * third])
            for name in self.samples[-1]
        }


@contextlib.contextmanager
def served(folder: Path, checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], Urls]]:
    """Starts a server of which nothing is as usual; its log is a pipe that is not read."""
    for name in ("tmp", "logs"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(checkpoint, folder / "checkpoint")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(default_model_repository(), folder / "models", ignore=ignored)
    os.mkfifo(folder / "logs" / "requests")
    environment = {name: value for name, value in os.environ.items() if name not in {"HOME", "LANG", "XDG_RUNTIME_DIR"}}
    readable, writable = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "glm_image.supervisor", "--checkpoint", folder / "checkpoint"),
            *("--model-repository", folder / "models", "--request-log", folder / "logs" / "requests"),
            *("--drain-seconds", "10", "--max-restarts", "0"),
            *(flag for kind in ("http", "grpc", "metrics") for flag in (f"--{kind}-port", "0")),
        ],
        stdout=subprocess.PIPE, stderr=writable, text=True, umask=0o077, preexec_fn=limit_descriptors,  # noqa: PLW1509
        env={**environment, "LC_ALL": "C", "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(writable)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready: "):
            raise RuntimeError(os.read(readable, MEBIBYTE).decode(errors="replace"))
        http_url, grpc_url = (url.partition("://")[2] for url in line.split()[1:])
        yield process, Urls(http_url, grpc_url)
    finally:
        process.kill()
        process.wait()
        os.close(readable)


def limit_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(USUAL_SOFT_LIMIT, hard), hard))


def connect(url: str, count: int, stack: contextlib.ExitStack) -> None:
    host, port = url.split(":")
    for number in range(count):
        connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=REQUEST_SECONDS))
        if number % 2:
            connection.sendall(b"POST /v2/models/glm_image/inf")


def paint(urls: Urls, alone: list[str], numbers: Iterator[int], ends: threading.Event, report: Report) -> None:
    """Generates images until the end, over both protocols."""
    client = Client(urls)  # type: ignore[arg-type]
    while not ends.is_set():
        number = next(numbers)
        protocol = (tritonclient.grpc, tritonclient.http)[(number + number // len(REQUESTS)) % 2]
        try:
            digest = client.digest(REQUESTS[number % len(REQUESTS)], protocol)
            report.images["equal" if digest == alone[number % len(REQUESTS)] else "different"] += 1
        except Exception as error:
            report.images["failed"] += 1
            report.faults.append(f"image {number}: {error!r}")


def refuse(urls: Urls, count: int, report: Report) -> None:
    for _ in range(count):
        with contextlib.closing(http.client.HTTPConnection(urls.http_url, timeout=REQUEST_SECONDS)) as connection:
            body = json.dumps({"prompt": "雪" * 200, "height": 1})
            try:
                connection.request("POST", "/v2/models/glm_image/generate", body)
                report.refusals[str(connection.getresponse().status)] += 1
            except (http.client.HTTPException, OSError) as error:
                report.refusals["failed"] += 1
                report.faults.append(f"refusal {report.refusals.total()}: {error!r}")


def sample(family: list[int], run_directory: Path) -> dict[str, float]:
    """Returns the resources of the largest process of the server, and of all together."""
    regions = SHARED_MEMORY.glob(f"glm_image_{run_directory.name.removeprefix(PREFIX)}_*")
    return {
        "resident": max(resident_bytes(pid) for pid in family),
        "descriptors": sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in family),
        "threads": sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in family),
        "shared_memory": sum(region.stat().st_blocks * 512 for region in regions),
    }


def run_round(process: subprocess.Popen[str], urls: Urls, report: Report) -> None:
    """Stops ``serve``, has requests refused meanwhile, and opens and closes connections."""
    process.send_signal(signal.SIGSTOP)
    try:
        refuse(urls, REFUSALS, report)
        with contextlib.ExitStack() as stack:
            connect(urls.http_url, CHURN, stack)
    finally:
        process.send_signal(signal.SIGCONT)


def soak(folder: Path, flags: argparse.Namespace) -> Report:
    """Runs the server for the given time, then stops it."""
    report, ends, numbers = Report(), threading.Event(), itertools.count()
    with served(folder, flags.checkpoint) as (process, urls), contextlib.ExitStack() as idle:
        alone = [Client(urls).digest(values, tritonclient.grpc) for values in REQUESTS]  # type: ignore[arg-type]
        family = descendants(process.pid)
        connect(urls.http_url, flags.idle, idle)
        run_directory = Path(f"/proc/{family[1]}/cwd").readlink().parents[1]
        for path in (run_directory / "heartbeats").iterdir():
            path.unlink()
        threads = [
            threading.Thread(target=paint, args=(urls, alone, numbers, ends, report)) for _ in range(flags.clients)
        ]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while time.monotonic() - began < flags.seconds or sum(report.images.values()) < flags.images:
            next_round = time.monotonic() + ROUND_SECONDS
            run_round(process, urls, report)
            ends.wait(max(0.0, next_round - time.monotonic()))
            report.samples.append(sample(family, run_directory))
        ends.set()
        for thread in threads:
            thread.join(REQUEST_SECONDS)
        stop(process, family, run_directory, report)
    check(report, flags)
    return report


def stop(process: subprocess.Popen[str], family: list[int], run_directory: Path, report: Report) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        code: object = process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        code = f"not within {END_SECONDS:g} s"
    if code != 0:
        report.faults.append(f"serve ended with {code}")
    left = [str(pid) for pid in family if Path(f"/proc/{pid}").exists()]
    if left or run_directory.exists():
        report.faults.append(f"left: {left}, {run_directory}: {run_directory.exists()}")


def check(report: Report, flags: argparse.Namespace) -> None:
    if report.images["equal"] < flags.images or set(report.images) > {"equal"}:
        report.faults.append(f"images: {dict(report.images)}; expected: {flags.images} equal ones")
    if set(report.refusals) != {"400"}:
        report.faults.append(f"refusals: {dict(report.refusals)}")
    for name, growth in report.growth().items():
        if growth > GROWTH[name]:
            report.faults.append(f"{name} grew by {growth:g}; allowed: {GROWTH[name]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="host_soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--seconds", type=float, default=600, help="the shortest time (%(default)s)")
    parser.add_argument("--images", type=int, default=500, help="the smallest number (%(default)s)")
    parser.add_argument("--clients", type=int, default=2, help="concurrent images (%(default)s)")
    parser.add_argument("--idle", type=int, default=2000, help="idle connections (%(default)s)")
    return parser.parse_args()


def main() -> int:
    flags = parse_arguments()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        if flags.checkpoint is None:
            flags.checkpoint = tiny_checkpoint(Path(folder))
        report = soak(Path(folder) / NAME, flags)
    for fault in report.faults:
        print(fault, file=sys.stderr)
    results: dict[str, Any] = {
        "images": dict(report.images), "refusals": dict(report.refusals), "rounds": len(report.samples),
        "growth": report.growth(), "last": report.samples[-1], "faults": len(report.faults),
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures a server from outside. Prints JSON lines.

    scripts/bench/served.py [--checkpoint DIR] [--size 1024x1024] [--steps 50] [--concurrency 1,2,4,8]
    scripts/bench/served.py --url HOST:8000 --grpc-url HOST:8001 --request-rate 0.5,1

For each level: throughput, latency, the seconds of every stage by the responses' metadata, and Triton's counts for each
model. At the end: the peak memory of each process. The exit code is 1 if a request failed.

Triton's compute seconds of ``glm_ar`` end when the engine has queued the request; ``ar_queue``, ``prefill`` and
``decode`` of the responses are the seconds in which it waited and computed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import load
from ceilings import report_ceilings_of
from deploy import add_flags, deployed, mps_clients
from load import Level, Response, Values
from measure import PROMPT, add_size, new_parser, parse, report, size_name
from servers import memory, tiny_checkpoint

from glm_image.request.geometry import Size
from glm_image.supervisor import ServerSettings, TritonServer

MODELS = ("glm_image", "glm_ar", "glm_dit")
DIFFERENT_SEEDS = 16
PHASES = ("queue", "compute_input", "compute_infer", "compute_output")
PERCENTILES = (50, 90, 99)
COUNT_SECONDS = 5.0
"""Time for Triton to count the last requests."""
DRAIN_SECONDS = 5
"""For requests that the benchmark abandoned."""

BRIEF = {"sizes": "64x64", "steps": 2, "concurrency": "2", "requests": 4}


class Served(NamedTuple):
    """Where a server listens, and the process that its processes descend from; None if it is not known."""

    http_url: str
    grpc_url: str
    pid: int | None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = server_parser("served.py", __doc__, "256x256", steps=20)
    parser.add_argument("--pid", type=int, help="of the server at --url, whose memory is reported")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(%(default)s)")
    parser.add_argument("--driver", choices=("auto", "perf_analyzer", "own"), default="auto", help="(%(default)s)")
    parser.add_argument("--concurrency", type=_numbers, default="1,2,4,8", help="levels (%(default)s); '' for none")
    parser.add_argument("--request-rate", type=_numbers, default="", help="levels, requests a second (none)")
    parser.add_argument("--requests", type=int, default=16, help="a level (%(default)s)")
    parser.add_argument("--warm-ups", type=int, default=1, help="requests before the first level (%(default)s)")
    parser.add_argument("--input-data", type=Path, metavar="FILE", help="requests in perf_analyzer's format")
    return parse(parser, arguments, BRIEF)


def server_parser(name: str, description: str | None, size: str, steps: int) -> argparse.ArgumentParser:
    """Returns a parser with the flags of every benchmark of a server; see ``served``."""
    parser = new_parser(name, description)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="as for scripts/serve")
    parser.add_argument("--url", metavar="HOST:PORT", help="HTTP of a running server; none is started then")
    parser.add_argument("--grpc-url", metavar="HOST:PORT", default="127.0.0.1:8001", help="its gRPC (%(default)s)")
    parser.set_defaults(pid=None)
    add_size(parser, size)
    parser.add_argument("--steps", type=int, default=steps, help="denoising steps (%(default)s)")
    add_flags(parser)
    return parser


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    program = None if flags.driver == "own" else load.find_perf_analyzer()
    if flags.driver == "perf_analyzer" and program is None:
        raise SystemExit("there is no perf_analyzer on PATH, and PERF_ANALYZER names none")
    requests = load.read_input_data(flags.input_data) if flags.input_data else default_requests(flags)
    levels = [Level("concurrency", value, flags.requests) for value in flags.concurrency]
    levels += [Level("rate", value, flags.requests) for value in flags.request_rate]
    if not flags.input_data:
        report("request", size=size_name(flags.sizes[0]), steps=flags.steps)
    started = time.monotonic()
    with served(flags) as server:
        report("start to ready", seconds=time.monotonic() - started)
        url = server.grpc_url if flags.protocol == "grpc" else server.http_url
        alone = load.own_load(url, flags.protocol, requests, Level("concurrency", 1, flags.warm_ups))
        report_stages({"warm_ups": flags.warm_ups}, alone)
        failed = sum(run_level(server, url, flags.protocol, program, requests, level) for level in levels)
        for process in memory(server.pid) if server.pid else ():
            report("memory", **process)
    return 1 if failed else 0


def request_values(size: Size, steps: int) -> Values:
    """Returns a request without its seed."""
    values = {"prompt": PROMPT, "width": size.width, "height": size.height, "num_inference_steps": steps}
    return {**values, "output_format": "png"}


def default_requests(flags: argparse.Namespace) -> list[Values]:
    common = request_values(flags.sizes[0], flags.steps)
    return [{**common, "seed": seed} for seed in range(DIFFERENT_SEEDS)]


@contextmanager
def checkpoint_of(flags: argparse.Namespace) -> Iterator[Path]:
    """Yields the checkpoint that the flags name, or a tiny one."""
    if flags.checkpoint:
        yield flags.checkpoint
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield tiny_checkpoint(Path(scratch))


@contextmanager
def served(flags: argparse.Namespace) -> Iterator[Served]:
    """Yields the server at ``--url``, or starts one and stops it at the end; reports the ceilings of its device."""
    if flags.url:
        yield Served(flags.url, flags.grpc_url, flags.pid)
        return
    report_ceilings_of("auto", brief=flags.brief)
    with (
        checkpoint_of(flags) as checkpoint,
        deployed(flags) as repository,
        TritonServer(ServerSettings(checkpoint, model_repository=repository, drain_seconds=DRAIN_SECONDS)) as server,
    ):
        if flags.mps:
            clients = mps_clients()
            report("mps", clients=len(clients))
            if not clients:
                raise SystemExit("--mps: the MPS server runs, and no model uses it")
        yield Served(server.http_url, server.grpc_url, os.getpid())


def run_level(
    server: Served, url: str, protocol: str, program: str | None, requests: Sequence[Values], level: Level
) -> int:
    """Sends the requests of a level and reports its figures; returns how many failed."""
    before = {model: statistics(server, model) for model in MODELS}
    if program is None:
        responses = load.own_load(url, protocol, requests, level)
    else:
        responses = load.perf_analyzer(program, url, protocol, requests, level)
    named = {level.mode: level.value}
    failed = report_load(named, "own" if program is None else "perf_analyzer", responses, level.requests)
    report_stages(named, responses)
    for model in MODELS:
        counted = before[model]["success"]["count"] + level.requests - failed
        report_statistics(named, model, before[model], statistics_from(server, model, counted))
    return failed


def report_load(named: Mapping[str, float], driver: str, responses: Sequence[Response], sent: int) -> int:
    good = sorted(response.seconds for response in responses if response.error is None)
    figures: dict[str, Any] = {"driver": driver, "requests": sent, "failed": sent - len(good)}
    if good:
        span = max(response.received for response in responses) - min(response.sent for response in responses)
        figures["requests_per_second"] = len(good) / span
        figures |= {f"p{percent}_seconds": percentile(good, percent) for percent in PERCENTILES}
    if errors := sorted({response.error for response in responses if response.error}):
        figures["errors"] = errors
    report("load", **named, **figures)
    return sent - len(good)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Returns the smallest value that at least ``percent`` of all do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def report_stages(named: Mapping[str, float], responses: Sequence[Response]) -> None:
    """Reports the mean seconds of every stage, by the responses' metadata."""
    seconds = [response.metadata["seconds"] for response in responses if response.metadata]
    if seconds:
        report("stages", **named, **{stage: sum(row[stage] for row in seconds) / len(seconds) for stage in seconds[0]})


def statistics(server: Served, model: str) -> Values:
    """Returns Triton's counts of a model since it was loaded."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/stats", timeout=30) as response:
        counts: Values = json.load(response)["model_stats"][0]["inference_stats"]
        return counts


def statistics_from(server: Served, model: str, succeeded: int) -> Values:
    """Returns Triton's counts once as many requests have succeeded: it counts a request after the answer."""
    until = time.monotonic() + COUNT_SECONDS
    while (counts := statistics(server, model))["success"]["count"] < succeeded and time.monotonic() < until:
        time.sleep(0.01)
    return counts


def report_statistics(named: Mapping[str, float], model: str, before: Values, after: Values) -> None:
    """Reports Triton's counts for a model between two moments: requests, and mean seconds of each phase."""
    count = after["success"]["count"] - before["success"]["count"]
    means = {
        f"{phase}_seconds": (after[phase]["ns"] - before[phase]["ns"]) / 1e9 / max(count, 1)
        for phase in ("success", *PHASES)
    }
    failed = after["fail"]["count"] - before["fail"]["count"]
    report("triton", model=model, **named, count=count, failed=failed, **means)


if __name__ == "__main__":
    sys.exit(main())

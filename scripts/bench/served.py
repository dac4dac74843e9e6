"""Measures a served checkpoint from outside, one JSON object a line.

    served.py [--checkpoint DIR] [--size 1024x1024] [--steps 50] [--concurrency 1,2,4,8] [--request-rate 0.5,1]

For each level: throughput, latency, the seconds of every stage as the answers tell them, and what Triton counted for
each model. At the end: the peak memory of each process. The code is 1 when a request failed.

Triton's compute seconds of ``glm_ar`` end when its engine has taken the request; ``ar_queue``, ``prefill`` and
``decode`` of the answers are what the request then waited and computed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import load
from deploy import add_flags, deployed, mps_clients
from load import Answered, Level, Values
from measure import say

from glm_image.supervisor import TritonServer

MODELS = ("glm_image", "glm_ar", "glm_dit")
PROMPT = "A red fox reading a newspaper that says 'NEWS'"
DIFFERENT_SEEDS = 16
PHASES = ("queue", "compute_input", "compute_infer", "compute_output")
PERCENTILES = (50, 90, 99)
PROC = Path("/proc")
DRAIN_SECONDS = 5  # for what the benchmark gave up


class Served(NamedTuple):
    """Where the server listens, and the process that all of its own descend from, if it is on this machine."""

    http_url: str
    grpc_url: str
    pid: int | None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="served.py", description="Measures a served checkpoint from outside.")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="as serve has it")
    parser.add_argument("--url", metavar="HOST:PORT", help="HTTP of a server that runs already, in place of one's own")
    parser.add_argument("--grpc-url", metavar="HOST:PORT", default="127.0.0.1:8001", help="its gRPC (%(default)s)")
    parser.add_argument("--pid", type=int, help="its process, whose memory and whose children's is told")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--driver", choices=("auto", "perf_analyzer", "own"), default="auto")
    parser.add_argument("--concurrency", type=_numbers, default="1,2,4,8", help="levels (%(default)s); '' for none")
    parser.add_argument("--request-rate", type=_numbers, default="", help="levels, requests a second (none)")
    parser.add_argument("--requests", type=int, default=16, help="a level (%(default)s)")
    parser.add_argument("--warm-ups", type=int, default=1, help="requests before the first level (%(default)s)")
    parser.add_argument("--input-data", type=Path, metavar="FILE", help="requests as perf_analyzer reads them")
    parser.add_argument("--size", default="256x256", metavar="WxH", help="without --input-data (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="without --input-data (%(default)s)")
    add_flags(parser)
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    program = None if flags.driver == "own" else load.find_perf_analyzer()
    if flags.driver == "perf_analyzer" and program is None:
        raise SystemExit("there is no perf_analyzer on PATH, and PERF_ANALYZER names none")
    requests = load.read_input_data(flags.input_data) if flags.input_data else default_requests(flags)
    levels = [Level("concurrency", value, flags.requests) for value in flags.concurrency]
    levels += [Level("rate", value, flags.requests) for value in flags.request_rate]
    if not flags.input_data:
        say("request", size=flags.size, steps=flags.steps)
    with served(flags) as server:
        url = server.grpc_url if flags.protocol == "grpc" else server.http_url
        alone = load.own_load(url, flags.protocol, requests, Level("concurrency", 1, flags.warm_ups))
        say_stages({"warm_ups": flags.warm_ups}, alone)
        failed = sum(run_level(server, url, flags.protocol, program, requests, level) for level in levels)
        for process in memory(server.pid) if server.pid else ():
            say("memory", **process)
    return 1 if failed else 0


def default_requests(flags: argparse.Namespace) -> list[Values]:
    width, height = (int(side) for side in flags.size.split("x"))
    common = {"prompt": PROMPT, "width": width, "height": height, "num_inference_steps": flags.steps}
    return [{**common, "seed": seed, "output_format": "png"} for seed in range(DIFFERENT_SEEDS)]


@contextmanager
def served(flags: argparse.Namespace) -> Iterator[Served]:
    """The server that was named, or one over the checkpoint for as long as the benchmark takes."""
    if flags.url:
        yield Served(flags.url, flags.grpc_url, flags.pid)
        return
    with (
        nullcontext(flags.checkpoint) if flags.checkpoint else tiny_checkpoint() as checkpoint,
        deployed(flags) as repository,
        TritonServer(checkpoint, model_repository=repository, drain_seconds=DRAIN_SECONDS) as server,
    ):
        if flags.mps:
            clients = mps_clients()
            say("mps", clients=len(clients))
            if not clients:
                raise SystemExit("--mps: the MPS server runs, and none of the models computes through it")
        yield Served(server.http_url, server.grpc_url, os.getpid())


@contextmanager
def tiny_checkpoint() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "tiny")
        maker = Path(__file__).resolve().parents[1] / "make_tiny_checkpoint.py"
        subprocess.run([sys.executable, maker, folder], check=True, stdout=subprocess.DEVNULL)
        yield folder


def run_level(
    server: Served, url: str, protocol: str, program: str | None, requests: list[Values], level: Level
) -> int:
    """Sends one level's requests and says what came of it; returns how many failed."""
    before = {model: statistics(server, model) for model in MODELS}
    if program is None:
        answers = load.own_load(url, protocol, requests, level)
    else:
        answers = load.perf_analyzer(program, url, protocol, requests, level)
    named = {level.mode: level.value}
    failed = say_load(named, "own" if program is None else "perf_analyzer", answers, level.requests)
    say_stages(named, answers)
    for model in MODELS:
        say_statistics(named, model, before[model], statistics(server, model))
    return failed


def say_load(named: dict[str, float], driver: str, answers: list[Answered], asked: int) -> int:
    good = sorted(one.seconds for one in answers if one.error is None)
    told: dict[str, Any] = {"driver": driver, "requests": asked, "failed": asked - len(good)}
    if good:
        span = max(one.answered for one in answers) - min(one.sent for one in answers)
        told["requests_per_second"] = len(good) / span
        told |= {f"p{percent}_seconds": percentile(good, percent) for percent in PERCENTILES}
    if errors := sorted({one.error for one in answers if one.error}):
        told["errors"] = errors
    say("load", **named, **told)
    return asked - len(good)


def percentile(ordered: list[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def say_stages(named: dict[str, float], answers: list[Answered]) -> None:
    """Says the mean seconds of every stage, as the answers' metadata tell them."""
    told = [one.metadata["seconds"] for one in answers if one.metadata]
    if told:
        say("stages", **named, **{name: sum(one[name] for one in told) / len(told) for name in told[0]})


def statistics(server: Served, model: str) -> Values:
    """Triton's counts of a model since it was loaded."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/stats", timeout=30) as answer:
        counted: Values = json.load(answer)["model_stats"][0]["inference_stats"]
        return counted


def say_statistics(named: dict[str, float], model: str, before: Values, after: Values) -> None:
    """Says what Triton counted for a model meanwhile: requests, and mean seconds of each phase."""
    count = after["success"]["count"] - before["success"]["count"]
    means = {
        f"{phase}_seconds": (after[phase]["ns"] - before[phase]["ns"]) / 1e9 / max(count, 1)
        for phase in ("success", *PHASES)
    }
    say("triton", model=model, **named, count=count, failed=after["fail"]["count"] - before["fail"]["count"], **means)


def memory(root: int) -> list[Values]:
    """The peak and the present resident memory of the server's processes, from Linux's count of each."""
    found = []
    for pid in descendants(root):
        try:
            words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            status = dict(line.split(":", 1) for line in (PROC / str(pid) / "status").read_text().splitlines())
        except OSError:  # it ended while we looked
            continue
        program = Path(words[0]).name
        model = Path(words[1]).parents[1].name if program.endswith("_stub") else None
        kilobytes = {name: int(status[name].split()[0]) for name in ("VmHWM", "VmRSS") if name in status}
        if program == "tritonserver" or model:
            peak, now = (kilobytes.get(name, 0) * 1024 for name in ("VmHWM", "VmRSS"))
            found.append({"process": model or program, "pid": pid, "peak_bytes": peak, "resident_bytes": now})
    return found


def descendants(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended while we looked
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting.extend(children.get(found[-1], ()))
    return found


if __name__ == "__main__":
    sys.exit(main())

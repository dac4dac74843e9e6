"""Measures a server under requests that come at random, against what the planner's simulation says of it.

    plan.py [--painters 2] [--size 128x128] [--steps 60] [--rate 0.7] [--requests 60]

First single requests tell what each stage takes when nobody else is there. Then requests are sent open loop: each at
its time, whatever is unanswered. The same arrivals are simulated twice: from the times of the single requests
(``alone``), which is what a planner has, and from the seconds that each stage took in the run itself (``run``), which
judges the queues apart from the times: on a machine that others use too, only that can hold. Prints JSON lines;
``host`` tells how many cores others used meanwhile, and only where that is next to none do the ratios mean something.

Without --url it serves a tiny checkpoint with one first stage and ``--painters`` second ones on CPU cards, each with
one thread. They share the cores; so does the simulation of ``alone`` (--cores).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import load
from load import Answered, Level, Values
from measure import say
from served import PROC, Served, default_requests, descendants, tiny_checkpoint

from glm_image.plan.simulation import Layout, Outcome, Work, percentile, poisson_arrivals, saturate, simulate
from glm_image.plan.times import read_size, tokens_of
from glm_image.supervisor import TritonServer
from glm_image.supervisor.settings import default_model_repository
from glm_image_client import AsyncGlmImageClient, GlmImageClientError

REPEATS_OF_ONE = 8
FIRST_STAGE_PARTS = ("ar_queue", "prefill", "decode")
PAINTING = ("condition", "denoise")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plan.py", description="Measures a server against the planner's simulation.")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--url", metavar="HOST:PORT", help="gRPC of a server that runs already, in place of one's own")
    parser.add_argument("--painters", type=int, default=2, help="instances of glm_dit (%(default)s)")
    parser.add_argument("--shared", action="store_true", help="all instances share a device (own server: the cores)")
    parser.add_argument("--cores", type=float, default=len(os.sched_getaffinity(0)), help="of it (%(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="max_num_seqs of glm_ar (%(default)s)")
    parser.add_argument("--size", default="128x128", metavar="WxH", help="of the pictures (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="denoising steps (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.7, help="of what the simulation says is the most (%(default)s)")
    parser.add_argument("--requests", type=int, default=80, help="sent (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their arrivals (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    requests = default_requests(flags)
    with served(flags) as server:
        work = measure_work(server.grpc_url, requests, flags)
        layout = layout_of(flags)
        most = saturate(layout, work, 400).throughput
        arrivals = poisson_arrivals(flags.rate * most, flags.requests, flags.seed)
        say("plan", painters=flags.painters, most_a_second=most, rate=flags.rate * most, requests=flags.requests)
        began, before = time.monotonic(), busy_seconds()
        answers = asyncio.run(send(server.grpc_url, requests, arrivals))
        span = time.monotonic() - began
        (every, own), (every_before, own_before) = busy_seconds(), before
        say("host", cores_used=(own - own_before) / span, by_others=(every - every_before - own + own_before) / span)
    failed = [one.error for one in answers if one.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    apart = replace(layout, cores=math.inf)  # what instances take from each other is in the seconds of the run
    predictions = {
        "alone": simulate(layout, work, arrivals, flags.seed),
        "run": simulate(apart, work_of_run(work, answers), arrivals, flags.seed),
    }
    for times, predicted in predictions.items():
        compare(times, predicted, answers)
    return 0


@contextmanager
def served(flags: argparse.Namespace) -> Iterator[Served]:
    """The server that was named, or one with so many painters over a checkpoint."""
    if flags.url:
        yield Served("", flags.url, None)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch, tiny_checkpoint() as tiny:
        repository = Path(scratch, "models")
        shutil.copytree(default_model_repository(), repository)
        config = repository / "glm_dit" / "config.pbtxt"
        cards = ";".join(f"cpu:{card}" for card in range(1, flags.painters + 1))
        text = config.read_text().replace("count: 1", f"count: {flags.painters}")
        config.write_text(text.replace('string_value: "auto"', f'string_value: "{cards}"', 1))
        with TritonServer(flags.checkpoint or tiny, model_repository=repository) as server:
            yield Served(server.http_url, server.grpc_url, os.getpid())


def layout_of(flags: argparse.Namespace) -> Layout:
    painters = range(1, flags.painters + 1)
    if flags.shared or not flags.url:
        return Layout(("host",), ("host",) * flags.painters, flags.slots, flags.cores)
    return Layout(("card 0",), tuple(f"card {painter}" for painter in painters), flags.slots)


def measure_work(url: str, requests: list[Values], flags: argparse.Namespace) -> Work:
    """What single requests take, and a decode step of several together; of the painting, every measured value."""
    load.own_load(url, "grpc", requests, Level("concurrency", 1, 2 * flags.painters))
    alone = load.own_load(url, "grpc", requests, Level("concurrency", 1, REPEATS_OF_ONE * flags.painters))
    tokens = tokens_of(read_size(flags.size))
    parts = {
        name: statistics.median(one.metadata["seconds"][name] for one in alone) for name in alone[0].metadata["seconds"]
    }
    paints = [sum(one.metadata["seconds"][part] for part in PAINTING) for one in alone]
    overhead = statistics.median(one.seconds - sum(one.metadata["seconds"].values()) for one in alone)
    step = parts["decode"] / (tokens - 1)
    # Of a request for eight pictures the decoding counts eight times, and each of them takes its steps with the others.
    eight = [{**requests[0], "num_images": flags.slots, "num_inference_steps": 1}]
    together = load.own_load(url, "grpc", eight, Level("concurrency", 1, 3))
    decode = statistics.median(one.metadata["seconds"]["decode"] for one in together) / flags.slots
    prefill_of_others = parts["prefill"] * (flags.slots - 1) / 2
    full = max(step, (decode - prefill_of_others) / (tokens - 1))
    say("times", **parts, overhead=overhead, step_ms=step * 1e3, full_step_ms=full * 1e3)
    return Work(
        tokens=tokens,
        prefill=parts["prefill"],
        step=lambda running: step + (full - step) * (running - 1) / max(1, flags.slots - 1),
        paint=lambda source: source.choice(paints),
        finish=parts["vae"],
        encode=parts["encode"],
        overhead=max(0.0, overhead),
    )


def work_of_run(work: Work, answers: list[Answered]) -> Work:
    """The same with the seconds that the stages took while all requests were there."""
    told = [one.metadata["seconds"] for one in answers]
    paints = [sum(seconds[part] for part in PAINTING) for seconds in told]
    step = statistics.mean(seconds["decode"] for seconds in told) / (work.tokens - 1)
    prefill, finish, encode = (
        statistics.mean(seconds[part] for seconds in told) for part in ("prefill", "vae", "encode")
    )
    return replace(
        work,
        prefill=prefill,
        step=lambda _: step,
        paint=lambda source: source.choice(paints),
        finish=finish,
        encode=encode,
        overhead=statistics.mean(one.seconds - sum(one.metadata["seconds"].values()) for one in answers),
    )


async def send(url: str, requests: list[Values], arrivals: list[float]) -> list[Answered]:
    """Sends each request at its time."""
    async with AsyncGlmImageClient(f"grpc://{url}") as client:
        began = time.monotonic()

        async def ask(index: int) -> Answered:
            due = began + arrivals[index]
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            try:
                result = await client.generate(**requests[index % len(requests)])
            except GlmImageClientError as error:
                return Answered(due, time.monotonic(), str(error), {})
            return Answered(due, time.monotonic(), None, dict(result.metadata.raw))

        return await asyncio.gather(*(ask(index) for index in range(len(arrivals))))


def busy_seconds() -> tuple[float, float]:
    """Seconds that this machine's cores have worked, and those of them for this process and its children."""
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, *interrupts = map(int, (PROC / "stat").read_text().splitlines()[0].split()[1:9])
    own = 0
    for pid in descendants(os.getpid()):
        with suppress(OSError):  # it ended while we looked
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])
    return (user + nice + system + sum(interrupts)) / tick, own / tick


def compare(times: str, predicted: Outcome, answers: list[Answered]) -> None:
    measured = [one.seconds for one in answers]
    span = max(one.answered for one in answers) - min(one.sent for one in answers)
    first = [sum(one.metadata["seconds"][part] for part in FIRST_STAGE_PARTS) for one in answers]
    queue = [one.metadata["seconds"]["dit_queue"] for one in answers]
    decoded = [end - begin for begin, end in zip(predicted.arrived, predicted.decoded, strict=True)]
    waited = [end - begin for begin, end in zip(predicted.decoded, predicted.painting, strict=True)]
    rows: dict[str, tuple[float, float]] = {
        "p50_seconds": (percentile(predicted.latencies, 50), percentile(measured, 50)),
        "p99_seconds": (percentile(predicted.latencies, 99), percentile(measured, 99)),
        "mean_seconds": (statistics.mean(predicted.latencies), statistics.mean(measured)),
        "first_stage_mean_seconds": (statistics.mean(decoded), statistics.mean(first)),
        "queue_mean_seconds": (statistics.mean(waited), statistics.mean(queue)),
        "images_per_second": (predicted.throughput, len(answers) / span),
    }
    for name, (said, found) in rows.items():
        say(name, times=times, predicted=said, measured=found, ratio=said / found if found else 0.0)


if __name__ == "__main__":
    sys.exit(main())

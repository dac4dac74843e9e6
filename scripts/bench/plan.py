"""Measures a server under requests that come at random, against what the planner's simulation says of it.

    plan.py [--ar cpu:0] [--dit "cpu:1;cpu:2"] [--size 128x128] [--steps 60] [--rate 0.7] [--requests 200]
    plan.py --ar cuda:0 --dit "cuda:0;cuda:1" --checkpoint FULL --dummy ...

First single requests tell what each stage takes when nobody else is there. Then as many are kept in flight as keep all
instances busy: how many pictures a second that gives is the first thing to compare. On the CPU it says instead how much
instances get out of the host when all of them compute, which is less than its number of cores where two of these are
threads of one: the simulation shares out so many (``cores``). Then requests are sent open loop, each at its time,
whatever is unanswered, and the same arrivals are simulated. Prints JSON lines; ``host`` tells how many cores others
used meanwhile: on the CPU, only where that is next to none do the ratios mean something.

Without --url it serves a checkpoint itself, without --checkpoint a tiny one; on CPU cards each instance has a thread.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import load
from deploy import add_flags, deployed
from load import Answered, Level, Values, answered
from measure import say
from served import DRAIN_SECONDS, PROC, Served, default_requests, descendants, tiny_checkpoint

from capacity_planner.simulation import Layout, Outcome, Work, percentile, poisson_arrivals, saturate, simulate
from capacity_planner.times import read_size, tokens_of
from glm_image.ar.admission import ADMISSIONS
from glm_image.supervisor import TritonServer
from glm_image_client import AsyncGlmImageClient

HOST = "host"
FIRST_STAGE_PARTS = ("ar_queue", "prefill", "decode")
PAINTING = ("condition", "denoise")
HALVINGS = 12
"""Of the range in which ``cores`` is looked for."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plan.py", description="Measures a server against the planner's simulation.")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--dummy", action="store_true", help="random weights of the checkpoint's sizes")
    parser.add_argument("--url", metavar="HOST:PORT", help="gRPC of a server that runs already, in place of one's own")
    parser.add_argument("--ar", default="cpu:0", metavar="DEVICE", help="of glm_ar (%(default)s)")
    parser.add_argument("--dit", default="cpu:1;cpu:2", metavar="DEVICES", help="of glm_dit (%(default)s)")
    parser.add_argument("--admission", choices=ADMISSIONS, default="at_once", help="of glm_ar (%(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="max_num_seqs of glm_ar (%(default)s)")
    parser.add_argument("--size", default="128x128", metavar="WxH", help="of the pictures (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="denoising steps (%(default)s)")
    parser.add_argument("--alone", type=int, default=16, help="requests sent one after the other (%(default)s)")
    parser.add_argument("--busy", type=int, default=100, help="sent to keep all instances busy (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.7, help="of the pictures a second then (%(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="sent at random (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their arrivals (%(default)s)")
    parser.set_defaults(model_repository=None)
    add_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    requests = default_requests(flags)
    with served(flags) as server:
        work = measure_work(server.grpc_url, requests, flags)
        layout, most = measure_most(server.grpc_url, requests, work, flags)
        arrivals = poisson_arrivals(flags.rate * most, flags.requests, flags.seed)
        say("plan", painters=len(layout.dit), rate=flags.rate * most, requests=flags.requests)
        began, before = time.monotonic(), busy_seconds()
        answers = asyncio.run(send(server.grpc_url, requests, arrivals))
        span = time.monotonic() - began
        (every, own), (every_before, own_before) = busy_seconds(), before
        say("host", cores_used=(own - own_before) / span, by_others=(every - every_before - own + own_before) / span)
    check(answers)
    compare(simulate(layout, work, arrivals, flags.seed), answers)
    return 0


def check(answers: list[Answered]) -> None:
    failed = [one.error for one in answers if one.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")


@contextmanager
def served(flags: argparse.Namespace) -> Iterator[Served]:
    """The server that was named, or one with these devices over a checkpoint."""
    if flags.url:
        yield Served("", flags.url, None)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    own = [f"glm_ar.devices={flags.ar}", f"glm_dit.devices={flags.dit}", f"glm_ar.admission={flags.admission}"]
    own.append(f"glm_ar.max_num_seqs={flags.slots}")
    if flags.dummy:
        own += ["glm_ar.load_format=dummy", "glm_dit.load_format=dummy"]
    flags.parameter = own + flags.parameter
    with (
        nullcontext(flags.checkpoint) if flags.checkpoint else tiny_checkpoint() as checkpoint,
        deployed(flags) as repository,
        TritonServer(checkpoint, model_repository=repository, drain_seconds=DRAIN_SECONDS) as server,
    ):
        yield Served(server.http_url, server.grpc_url, os.getpid())


def layout_of(flags: argparse.Namespace) -> Layout:
    """Each card is a device; all CPU cards are the host."""
    ar, *dit = (HOST if name.startswith("cpu") else name for name in (flags.ar, *flags.dit.split(";")))
    return Layout((ar,), tuple(dit), flags.slots, admission=flags.admission)


def measure_most(url: str, requests: list[Values], work: Work, flags: argparse.Namespace) -> tuple[Layout, float]:
    """Keeps all instances busy; returns the layout, with the cores the host has then, and the pictures a second."""
    layout = layout_of(flags)
    in_flight = layout.slots + 2 * len(layout.dit)  # as ``saturate`` has it
    answers = load.own_load(url, "grpc", requests, Level("concurrency", in_flight, flags.busy))
    check(answers)
    most = len(answers) / (max(one.answered for one in answers) - min(one.sent for one in answers))
    if HOST in layout.dit:
        layout = replace(layout, cores=fitted_cores(layout, work, flags.busy, most))
    predicted = saturate(layout, work, flags.busy).throughput
    say("most_a_second", predicted=predicted, measured=most, ratio=predicted / most, cores=layout.cores)
    return layout, most


def fitted_cores(layout: Layout, work: Work, requests: int, most: float) -> float:
    """Returns the cores with which so many pictures a second are simulated; at most one for each instance."""
    low, high = 0.0, float(1 + len(layout.dit))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if saturate(replace(layout, cores=middle), work, requests).throughput < most:
            low = middle
        else:
            high = middle
    return high


def measure_work(url: str, requests: list[Values], flags: argparse.Namespace) -> Work:
    """What single requests take, and a decode step of several together; of the painting, every measured value."""
    warm_ups = 2 * len(flags.dit.split(";"))
    check(load.own_load(url, "grpc", requests, Level("concurrency", warm_ups, warm_ups)))
    alone = load.own_load(url, "grpc", requests, Level("concurrency", 1, flags.alone))
    check(alone)
    tokens = tokens_of(read_size(flags.size))
    parts = {
        name: statistics.median(one.metadata["seconds"][name] for one in alone) for name in alone[0].metadata["seconds"]
    }
    paints = [sum(one.metadata["seconds"][part] for part in PAINTING) for one in alone]
    overhead = statistics.median(one.seconds - sum(one.metadata["seconds"].values()) for one in alone)
    step = parts["decode"] / (tokens - 1)
    # Of a request for eight pictures the decoding counts eight times, and each of them takes its steps with the others.
    eight = [{**requests[0], "num_images": flags.slots, "num_inference_steps": 1}]
    together = load.own_load(url, "grpc", eight, Level("concurrency", 1, max(1, flags.alone // 4)))
    check(together)
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


async def send(url: str, requests: list[Values], arrivals: list[float]) -> list[Answered]:
    """Sends each request at its time."""
    async with AsyncGlmImageClient(f"grpc://{url}") as client:
        began = time.monotonic()

        async def ask(index: int) -> Answered:
            due = began + arrivals[index]
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            one = await answered(client.generate(**requests[index % len(requests)]))
            return replace(one, sent=due)

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


def compare(predicted: Outcome, answers: list[Answered]) -> None:
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
        say(name, predicted=said, measured=found, ratio=said / found if found else 0.0)


if __name__ == "__main__":
    sys.exit(main())

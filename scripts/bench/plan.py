#!/usr/bin/env python3
"""Measures a server under requests that arrive at random, against the capacity planner's simulation. Prints JSON lines.

    scripts/bench/plan.py [--ar cpu:0] [--dit "cpu:1;cpu:2"] [--size 128x128] [--steps 60] [--rate 0.7] [--requests 200]
    scripts/bench/plan.py --ar cuda:0 --dit "cuda:0;cuda:1" --checkpoint FULL --dummy

Single requests give the seconds of each stage alone. Then all instances are kept busy, and their images a second are
compared with the simulation's. On a CPU that comparison is not possible: there the rate gives the number of cores that
instances get when all compute, which is below the host's where two cores are threads of one; the simulation shares out
that number (``cores``). Then requests are sent open loop, each at its time, and the same arrivals are simulated.
``host`` reports the cores that other programs used: on a CPU, the ratios mean something only if that is near 0.

On CPU devices each instance computes with one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import load
from ceilings import report_ceilings_of
from deploy import deployed
from load import Level, Response, Values, response_to
from measure import parse, report
from served import DRAIN_SECONDS, Served, checkpoint_of, default_requests, server_parser
from servers import PROC, descendants

from capacity_planner.simulation import (
    Deployment,
    Outcome,
    StageCosts,
    percentile,
    poisson_arrivals,
    saturate,
    simulate,
)
from capacity_planner.times import image_tokens
from glm_image.ar.admission import ADMISSIONS
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image_client import AsyncGlmImageClient

HOST = "host"
AR_PARTS = ("ar_queue", "prefill", "decode")
DENOISING = ("condition", "denoise")
HALVINGS = 12
"""Of the interval in which ``cores`` is searched."""

BRIEF = {"sizes": "64x64", "steps": 2, "alone": 2, "busy": 6, "requests": 6}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = server_parser("plan.py", __doc__, "128x128", steps=60)
    parser.add_argument("--dummy", action="store_true", help="random weights of the checkpoint's sizes")
    parser.add_argument("--ar", default="cpu:0", metavar="DEVICE", help="of glm_ar (%(default)s)")
    parser.add_argument("--dit", default="cpu:1;cpu:2", metavar="DEVICES", help="of glm_dit (%(default)s)")
    parser.add_argument("--admission", choices=ADMISSIONS, default="at_once", help="of glm_ar (%(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="max_num_seqs of glm_ar (%(default)s)")
    parser.add_argument("--alone", type=int, default=16, help="requests sent one after the other (%(default)s)")
    parser.add_argument("--busy", type=int, default=100, help="sent to keep all instances busy (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.7, help="of the images a second then (%(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="sent at random (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their arrivals (%(default)s)")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    requests = default_requests(flags)
    with served(flags) as server:
        work = measure_work(server.grpc_url, requests, flags)
        layout, most = measure_most(server.grpc_url, requests, work, flags)
        arrivals = poisson_arrivals(flags.rate * most, flags.requests, flags.seed)
        report("plan", instances=len(layout.dit), rate=flags.rate * most, requests=flags.requests)
        began, before = time.monotonic(), busy_seconds()
        responses = asyncio.run(send(server.grpc_url, requests, arrivals))
        span = time.monotonic() - began
        (all_cores, own), (all_before, own_before) = busy_seconds(), before
        used, used_by_all = (own - own_before) / span, (all_cores - all_before) / span
        report("host", cores_used=used, by_others=used_by_all - used)
    check(responses)
    compare(simulate(layout, work, arrivals, flags.seed), responses)
    return 0


def check(responses: Sequence[Response]) -> None:
    failed = [response.error for response in responses if response.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(responses)} requests failed: {failed[0]}")


@contextmanager
def served(flags: argparse.Namespace) -> Iterator[Served]:
    """Yields the server at ``--url``, or starts one with these devices."""
    if flags.url:
        yield Served(flags.url, flags.grpc_url, None)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report_ceilings_of(flags.ar, brief=flags.brief)
    own = [f"glm_ar.devices={flags.ar}", f"glm_dit.devices={flags.dit}", f"glm_ar.admission={flags.admission}"]
    own.append(f"glm_ar.max_num_seqs={flags.slots}")
    if flags.dummy:
        own += ["glm_ar.load_format=dummy", "glm_dit.load_format=dummy"]
    flags.parameter = own + flags.parameter
    with (
        checkpoint_of(flags) as checkpoint,
        deployed(flags) as repository,
        TritonServer(ServerSettings(checkpoint, model_repository=repository, drain_seconds=DRAIN_SECONDS)) as server,
    ):
        yield Served(server.http_url, server.grpc_url, os.getpid())


def layout_of(flags: argparse.Namespace) -> Deployment:
    """Returns the layout to simulate: each device is one, and all CPU devices are the host."""
    ar, *dit = (HOST if name.startswith("cpu") else name for name in (flags.ar, *flags.dit.split(";")))
    return Deployment((ar,), tuple(dit), flags.slots, admission=flags.admission)


def measure_most(
    url: str, requests: list[Values], work: StageCosts, flags: argparse.Namespace
) -> tuple[Deployment, float]:
    """Keeps all instances busy; returns the layout, with the cores that the host then has, and the images a second."""
    layout = layout_of(flags)
    in_flight = layout.slots + 2 * len(layout.dit)  # as ``saturate`` has it
    responses = load.own_load(url, "grpc", requests, Level("concurrency", in_flight, flags.busy))
    check(responses)
    most = len(responses) / span_of(responses)
    if HOST in layout.dit:
        layout = replace(layout, cores=fitted_cores(layout, work, flags.busy, most))
    predicted = saturate(layout, work, flags.busy).throughput
    report("most_a_second", predicted=predicted, measured=most, ratio=predicted / most, cores=layout.cores)
    return layout, most


def fitted_cores(layout: Deployment, work: StageCosts, requests: int, most: float) -> float:
    """Returns the cores with which the simulation gives ``most`` images a second; at most one for each instance."""
    low, high = 0.0, float(1 + len(layout.dit))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if saturate(replace(layout, cores=middle), work, requests).throughput < most:
            low = middle
        else:
            high = middle
    return high


def measure_work(url: str, requests: list[Values], flags: argparse.Namespace) -> StageCosts:
    """Measures single requests, and a decode step of several together; of the denoising, keeps every value."""
    warm_ups = 2 * len(flags.dit.split(";"))
    check(load.own_load(url, "grpc", requests, Level("concurrency", warm_ups, warm_ups)))
    alone = load.own_load(url, "grpc", requests, Level("concurrency", 1, flags.alone))
    check(alone)
    tokens = image_tokens(flags.sizes[0])
    parts = {
        name: statistics.median(response.metadata["seconds"][name] for response in alone)
        for name in alone[0].metadata["seconds"]
    }
    denoising = [sum(response.metadata["seconds"][part] for part in DENOISING) for response in alone]
    overhead = statistics.median(response.seconds - sum(response.metadata["seconds"].values()) for response in alone)
    step = parts["decode"] / (tokens - 1)
    # The metadata of a request for eight images has the sum of their decode seconds; they take their steps together.
    eight = [{**requests[0], "num_images": flags.slots, "num_inference_steps": 1}]
    together = load.own_load(url, "grpc", eight, Level("concurrency", 1, max(1, flags.alone // 4)))
    check(together)
    decode = statistics.median(response.metadata["seconds"]["decode"] for response in together) / flags.slots
    prefill_of_others = parts["prefill"] * (flags.slots - 1) / 2
    full = max(step, (decode - prefill_of_others) / (tokens - 1))
    report("times", **parts, overhead=overhead, step_ms=step * 1e3, full_step_ms=full * 1e3)
    return StageCosts(
        tokens=tokens,
        prefill=parts["prefill"],
        step=lambda running: step + (full - step) * (running - 1) / max(1, flags.slots - 1),
        denoise=lambda source: source.choice(denoising),
        finish=parts["vae"],
        encode=parts["encode"],
        overhead=max(0.0, overhead),
    )


async def send(url: str, requests: list[Values], arrivals: list[float]) -> list[Response]:
    """Sends each request at its time."""
    async with AsyncGlmImageClient(f"grpc://{url}") as client:
        started = time.monotonic()

        async def send_one(index: int) -> Response:
            due = started + arrivals[index]
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            response = await response_to(client.generate(**requests[index % len(requests)]))
            return replace(response, sent=due)

        return await asyncio.gather(*(send_one(index) for index in range(len(arrivals))))


def busy_seconds() -> tuple[float, float]:
    """Returns the busy seconds of the host's cores, and those of this process and its descendants."""
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, *interrupts = map(int, (PROC / "stat").read_text().splitlines()[0].split()[1:9])
    own = 0
    for pid in descendants(os.getpid()):
        with suppress(OSError):  # the process has ended
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])
    return (user + nice + system + sum(interrupts)) / tick, own / tick


def span_of(responses: Sequence[Response]) -> float:
    """Returns the seconds from the first request to the last response."""
    return max(response.received for response in responses) - min(response.sent for response in responses)


def compare(predicted: Outcome, responses: Sequence[Response]) -> None:
    measured = [response.seconds for response in responses]
    first = [sum(response.metadata["seconds"][part] for part in AR_PARTS) for response in responses]
    queue = [response.metadata["seconds"]["dit_queue"] for response in responses]
    decoded = [end - begin for begin, end in zip(predicted.arrived, predicted.decoded, strict=True)]
    waited = [end - begin for begin, end in zip(predicted.decoded, predicted.denoise_started, strict=True)]
    rows: dict[str, tuple[float, float]] = {
        "p50_seconds": (percentile(predicted.latencies, 50), percentile(measured, 50)),
        "p99_seconds": (percentile(predicted.latencies, 99), percentile(measured, 99)),
        "mean_seconds": (statistics.mean(predicted.latencies), statistics.mean(measured)),
        "first_stage_mean_seconds": (statistics.mean(decoded), statistics.mean(first)),
        "queue_mean_seconds": (statistics.mean(waited), statistics.mean(queue)),
        "images_per_second": (predicted.throughput, len(responses) / span_of(responses)),
    }
    for name, (expected, found) in rows.items():
        report(name, predicted=expected, measured=found, ratio=expected / found if found else 0.0)


if __name__ == "__main__":
    sys.exit(main())

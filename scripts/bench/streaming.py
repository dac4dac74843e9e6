#!/usr/bin/env python3
r"""Measures ``glm_image_stream``: when the first intermediate image comes, and what events cost. Prints JSON lines.

    scripts/bench/streaming.py --checkpoint FULL --size 1024x1024 --steps 50 \
        --parameter glm_ar.load_format=dummy --parameter glm_dit.load_format=dummy

How soon a slot or the device is free after a stream is closed; the seconds of a request over the plain ensemble,
streamed with progress alone, and streamed with a preview and latent previews, in turns; and, of requests in flight
together, what intermediate images cost the throughput and the 99th percentile.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from measure import parse, report, size_name
from served import percentile, request_values, served, server_parser

from glm_image_client import GlmImageClient

PREVIEW_STEPS = 6
ESTIMATES = 5
"""Of an image."""

CLOSE_IN = ("decode", "denoise")
FEW_STEPS = 4
BRIEF = {"sizes": "64x64", "steps": 10, "leave": 1, "repeats": 1, "concurrency": 2, "requests": 2}


class Streamed(NamedTuple):
    """Seconds of a request until its end and until its first intermediate image, and its number of events."""

    whole: float
    first_picture: float | None
    events: int


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = server_parser("streaming.py", __doc__, "1024x1024", steps=50)
    parser.add_argument("--leave", type=int, default=3, help="streams closed in each stage (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="single requests of each kind, in turns (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight together (%(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="sent together in all; 0 = none (%(default)s)")
    parser.add_argument(
        "--within",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="since the start, after which no single request is sent",
    )
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    started = time.monotonic()
    values = request_values(flags.sizes[0], flags.steps)
    del values["output_format"]
    report("request", size=size_name(flags.sizes[0]), steps=flags.steps)
    with served(flags) as server, GlmImageClient(f"grpc://{server.grpc_url}") as client:
        report("start to ready", seconds=time.monotonic() - started)
        steps = min(FEW_STEPS, flags.steps)
        first = {**values, **options_of(steps)["pictures"], "num_inference_steps": steps}
        stream(client, first)  # loads what is used first
        measure_closing(client, values, flags.leave)
        measure_alone(client, values, flags.repeats, started + flags.within)
        if flags.requests:
            measure_together(client, values, flags.concurrency, flags.requests)
    return 0


def stream(client: GlmImageClient, values: Mapping[str, Any]) -> Streamed:
    """Streams a request to its end."""
    started, first, events = time.perf_counter(), None, 0
    for event in client.stream(**values):
        events += 1
        if first is None and event.files:
            first = time.perf_counter() - started
    return Streamed(time.perf_counter() - started, first, events)


def options_of(steps: int) -> dict[str, dict[str, int]]:
    """Returns the options of each kind of stream."""
    return {
        "progress": {"preview_steps": 0, "preview_every": 0},
        "pictures": {"preview_steps": PREVIEW_STEPS, "preview_every": max(1, steps // ESTIMATES)},
    }


def generate(client: GlmImageClient, values: Mapping[str, Any]) -> Streamed:
    """Sends a request to the plain ensemble."""
    started = time.perf_counter()
    client.generate(**values)
    return Streamed(time.perf_counter() - started, None, 0)


def measure_alone(client: GlmImageClient, values: Mapping[str, Any], repeats: int, until: float) -> None:
    """Single requests of each kind, in turns; reports each, then the medians."""
    kinds: dict[str, Callable[[int], Streamed]] = {"plain": lambda seed: generate(client, {**values, "seed": seed})}
    for name, options in options_of(values["num_inference_steps"]).items():
        kinds[name] = lambda seed, options=options: stream(client, {**values, **options, "seed": seed})  # type: ignore[misc]
    finished: dict[str, list[Streamed]] = {name: [] for name in kinds}
    longest = 0.0
    for turn in range(repeats * len(kinds)):
        name = list(kinds)[turn % len(kinds)]
        if time.monotonic() + longest > until:
            break
        finished[name].append(kinds[name](turn))
        longest = max(longest, finished[name][-1].whole)
        report("answered alone", way=name, **finished[name][-1]._asdict())
    report_alone({name: streams for name, streams in finished.items() if streams})


def report_alone(finished: Mapping[str, Sequence[Streamed]]) -> None:
    for name, streams in finished.items():
        base = statistics.median(streamed.whole for streamed in finished["plain"])
        whole = statistics.median(streamed.whole for streamed in streams)
        first = [streamed.first_picture for streamed in streams if streamed.first_picture is not None]
        figures: dict[str, Any] = {"seconds": whole, "least": min(streamed.whole for streamed in streams)}
        figures |= {"cost": whole / base - 1, "events": streams[0].events} if name != "plain" else {}
        figures |= {"first_picture_seconds": statistics.median(first), "worst": max(first)} if first else {}
        report(f"alone, {name}", **figures, requests=len(streams))


def measure_together(client: GlmImageClient, values: Mapping[str, Any], concurrency: int, requests: int) -> None:
    """Requests in flight together, with progress alone and with intermediate images."""
    base: tuple[float, float] | None = None
    for name, options in options_of(values["num_inference_steps"]).items():
        started = time.perf_counter()

        def send(seed: int, options: dict[str, int] = options, way: str = name, started: float = started) -> Streamed:
            streamed = stream(client, {**values, **options, "seed": seed})
            report("answered", way=way, since_start=time.perf_counter() - started, **streamed._asdict())
            return streamed

        with ThreadPoolExecutor(concurrency) as pool:
            finished = list(pool.map(send, range(requests)))
        rate = requests / (time.perf_counter() - started)
        p99 = percentile(sorted(streamed.whole for streamed in finished), 99)
        base = base or (rate, p99)
        first = sorted(streamed.first_picture for streamed in finished if streamed.first_picture is not None)
        figures: dict[str, Any] = {"requests_per_second": rate, "p99_seconds": p99, "requests": requests}
        if first:
            figures |= {
                "throughput_loss": 1 - rate / base[0],
                "p99_loss": p99 / base[1] - 1,
                "with_pictures": len(first),
            }
            figures |= {"first_picture_seconds": statistics.median(first), "worst": first[-1]}
        report(f"{concurrency} together, {name}", **figures)


def measure_closing(client: GlmImageClient, values: Mapping[str, Any], repeats: int) -> None:
    """Closes streams in each stage, and waits until the request has ended."""
    for stage in CLOSE_IN:
        waits = []
        for turn in range(repeats):
            request_id = f"closed-{stage}-{turn}"
            events = client.stream(**values, **options_of(1)["progress"], request_id=request_id)
            next(event for event in events if event.stage == stage and event.done > 0)
            started = time.perf_counter()
            events.close()
            while client.status(request_id)["state"] in {"running", "queued"}:
                pass
            waits.append(time.perf_counter() - started)
        if waits:
            report(f"closed to free in {stage}", median_seconds=statistics.median(waits), worst_seconds=max(waits))


if __name__ == "__main__":
    sys.exit(main())

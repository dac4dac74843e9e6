r"""Measures ``glm_image_stream`` on a server of its own: how soon there is something to see, and what that costs.

    streaming.py --checkpoint FULL --parameter glm_ar.load_format=dummy --parameter glm_dit.load_format=dummy \
        --size 1024x1024 --steps 50

Prints JSON lines, each as soon as it is known: how soon the device is free after a stream is closed; the seconds of a
request over the plain ensemble, streamed with progress alone, and streamed with a preview and sketches, taken in turns,
and when the first picture came; and of requests in flight together what previews cost the rate and the 99th percentile.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from deploy import add_flags
from measure import say
from served import PROMPT, percentile, served

from glm_image_client import GlmImageClient

WAYS: dict[str, dict[str, int]] = {
    "progress": {"preview_steps": 0, "preview_every": 0},
    "pictures": {"preview_steps": 6, "preview_every": 10},
}
LEAVE_AT = ("decode", "denoise")
FEW_STEPS = 4


class WatchedProcess(NamedTuple):
    """Seconds of a request until its end, until its first picture, and its events."""

    whole: float
    first_picture: float | None
    events: int


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="streaming.py", description="Measures glm_image_stream.")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="as serve has it")
    parser.add_argument("--size", default="1024x1024", metavar="WxH", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--leave", type=int, default=3, help="streams closed at each stage (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="requests of each kind alone, in turns (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight together (%(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="of them in all, for a rate; 0 = none (%(default)s)")
    parser.add_argument(
        "--within",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="by when those alone are to end",
    )
    add_flags(parser)
    flags = parser.parse_args(arguments)
    flags.url = None
    return flags


def watch(client: GlmImageClient, values: dict[str, Any]) -> WatchedProcess:
    began, first, events = time.perf_counter(), None, 0
    for event in client.stream(**values):
        events += 1
        if first is None and event.files:
            first = time.perf_counter() - began
    return WatchedProcess(time.perf_counter() - began, first, events)


def plain(client: GlmImageClient, values: dict[str, Any]) -> WatchedProcess:
    began = time.perf_counter()
    client.generate(**values)
    return WatchedProcess(time.perf_counter() - began, None, 0)


def measure_alone(client: GlmImageClient, values: dict[str, Any], repeats: int, until: float) -> None:
    kinds: dict[str, Callable[[int], WatchedProcess]] = {"plain": lambda seed: plain(client, {**values, "seed": seed})}
    for name, options in WAYS.items():
        kinds[name] = lambda seed, options=options: watch(client, {**values, **options, "seed": seed})  # type: ignore[misc]
    taken: dict[str, list[WatchedProcess]] = {name: [] for name in kinds}
    longest = 0.0
    for turn in range(repeats * len(kinds)):
        name = list(kinds)[turn % len(kinds)]
        if time.monotonic() + longest > until:
            break
        taken[name].append(kinds[name](turn))
        longest = max(longest, taken[name][-1].whole)
        say("answered alone", way=name, **taken[name][-1]._asdict())
    say_alone({name: all_of for name, all_of in taken.items() if all_of})


def say_alone(taken: dict[str, list[WatchedProcess]]) -> None:
    for name, all_of in taken.items():
        base = statistics.median(one.whole for one in taken["plain"])
        whole = statistics.median(one.whole for one in all_of)
        first = [one.first_picture for one in all_of if one.first_picture is not None]
        told: dict[str, Any] = {"seconds": whole, "least": min(one.whole for one in all_of)}
        told |= {"cost": whole / base - 1, "events": all_of[0].events} if name != "plain" else {}
        told |= {"first_picture_seconds": statistics.median(first), "worst": max(first)} if first else {}
        say(f"alone, {name}", **told, requests=len(all_of))


def measure_together(client: GlmImageClient, values: dict[str, Any], concurrency: int, requests: int) -> None:
    base: tuple[float, float] | None = None
    for name, options in WAYS.items():
        began = time.perf_counter()

        def watched(
            seed: int, options: dict[str, int] = options, way: str = name, since: float = began
        ) -> WatchedProcess:
            one = watch(client, {**values, **options, "seed": seed})
            say("answered", way=way, since_start=time.perf_counter() - since, **one._asdict())
            return one

        with ThreadPoolExecutor(concurrency) as pool:
            taken = list(pool.map(watched, range(requests)))
        rate = requests / (time.perf_counter() - began)
        p99 = percentile(sorted(one.whole for one in taken), 99)
        base = base or (rate, p99)
        first = sorted(one.first_picture for one in taken if one.first_picture is not None)
        told: dict[str, Any] = {"requests_per_second": rate, "p99_seconds": p99, "requests": requests}
        if first:
            told |= {"throughput_loss": 1 - rate / base[0], "p99_loss": p99 / base[1] - 1, "with_pictures": len(first)}
            told |= {"first_picture_seconds": statistics.median(first), "worst": first[-1]}
        say(f"{concurrency} together, {name}", **told)


def measure_leaving(client: GlmImageClient, values: dict[str, Any], repeats: int) -> None:
    for stage in LEAVE_AT:
        waits = []
        for turn in range(repeats):
            request_id = f"left-{stage}-{turn}"
            events = client.stream(**values, **WAYS["progress"], request_id=request_id)
            next(event for event in events if event.stage == stage and event.done > 0)
            began = time.perf_counter()
            events.close()
            while client.status(request_id)["state"] in {"running", "queued"}:
                pass
            waits.append(time.perf_counter() - began)
        if waits:
            say(f"closed to free in {stage}", median_seconds=statistics.median(waits), worst_seconds=max(waits))


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    started = time.monotonic()
    width, height = (int(side) for side in flags.size.split("x"))
    values = {"prompt": PROMPT, "width": width, "height": height, "num_inference_steps": flags.steps}
    say("request", size=flags.size, steps=flags.steps)
    with served(flags) as server, GlmImageClient(f"grpc://{server.grpc_url}") as client:
        say("start to ready", seconds=time.monotonic() - started)
        watch(client, {**values, **WAYS["pictures"], "num_inference_steps": FEW_STEPS})  # what is loaded at first use
        measure_leaving(client, values, flags.leave)
        measure_alone(client, values, flags.repeats, started + flags.within)
        if flags.requests:
            measure_together(client, values, flags.concurrency, flags.requests)
    return 0


if __name__ == "__main__":
    sys.exit(main())

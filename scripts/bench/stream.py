#!/usr/bin/env python3
r"""Measures a steady stream of requests through both stages, against its parts alone. Prints JSON lines.

    scripts/bench/stream.py --checkpoint FULL --size 1024x1024 --steps 50 [--mps] \
        --parameter glm_ar.load_format=dummy --parameter glm_dit.load_format=dummy --parameter glm_ar.admission=gathered

Single requests give the seconds of each stage alone. Then a fixed number of requests is kept in flight, and the
responses after the first few are counted; the rest is abandoned. While the DiT denoises, the AR decodes up to eight
sequences together, so both on one device give at most one image in DiT + VAE + AR / 8 seconds: the bound. The exit code
is 1 if a request failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

from load import Level, Response, has_failed, own_load, steady_load, steady_rate
from measure import parse, report, size_name
from served import request_values, served, server_parser

AR_TOGETHER = 8
"""Sequences that the AR decodes in about the time of one: its ``max_num_seqs``."""

PARTS = {"ar_seconds": ("prefill", "decode"), "dit_seconds": ("condition", "denoise"), "vae_seconds": ("vae",)}
BRIEF = {"sizes": "64x64", "steps": 2, "concurrency": 3, "requests": 4, "warm_ups": 1, "alone": 1}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = server_parser("stream.py", __doc__, "256x256", steps=20)
    parser.add_argument("--concurrency", type=int, default=12, help="requests in flight (%(default)s)")
    parser.add_argument("--warm-ups", type=int, default=2, help="responses that are not counted (%(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="responses that are counted (%(default)s)")
    parser.add_argument("--alone", type=int, default=2, help="requests sent one after the other (%(default)s)")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    request = request_values(flags.sizes[0], flags.steps)
    started = time.monotonic()
    with served(flags) as server:
        report("start to ready", seconds=time.monotonic() - started, mps=flags.mps)
        level = Level("concurrency", 1, flags.alone + 1)
        alone = own_load(server.grpc_url, "grpc", [{**request, "seed": 1}], level)
        if has_failed(alone):
            return 1
        named = {"size": size_name(flags.sizes[0]), "steps": flags.steps, "mps": flags.mps}
        report("alone", **named, **stage_seconds(alone[1:]), requests=flags.alone)
        responses = steady_load(
            f"grpc://{server.grpc_url}",
            lambda client, seed: client.generate(**request, seed=seed),
            flags.concurrency,
            flags.warm_ups + flags.requests,
        )
        if has_failed(responses):
            return 1
        report_stream(flags, named, stage_seconds(alone[1:]), responses[flags.warm_ups :])
    return 0


def stage_seconds(responses: Sequence[Response]) -> dict[str, float]:
    """Returns the mean seconds of the parts of the bound."""
    seconds = [response.metadata["seconds"] for response in responses]
    return {name: sum(row[stage] for row in seconds for stage in part) / len(seconds) for name, part in PARTS.items()}


def report_stream(
    flags: argparse.Namespace, named: Mapping[str, object], alone: Mapping[str, float], responses: Sequence[Response]
) -> None:
    """Reports the seconds of the stages within the stream, and its images a second against the bound."""
    report("in the stream", **named, **stage_seconds(responses), requests=len(responses))
    rate = steady_rate(responses)
    bound = 1 / (alone["dit_seconds"] + alone["vae_seconds"] + alone["ar_seconds"] / AR_TOGETHER)
    report(
        "steady stream",
        **named,
        concurrency=flags.concurrency,
        requests=len(responses),
        pictures_per_second=rate,
        seconds_per_picture=1 / rate,
        bound_per_second=bound,
        to_bound=rate / bound,
    )


if __name__ == "__main__":
    sys.exit(main())

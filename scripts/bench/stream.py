"""Measures a steady stream of requests through both stages, against what its parts take alone.

    stream.py --checkpoint FULL --parameter glm_ar.load_format=dummy --parameter glm_dit.load_format=dummy \
        --parameter glm_ar.admission=gathered --size 1024x1024 --steps 50 [--mps]

One request after the other tells what each stage takes alone. Then a fixed number of requests is kept in flight, and
the answers after the first few are counted until enough have come; the rest is given up. While the second stage paints,
the first decodes for several pictures at once, so that both on one card can give at most one picture in DiT + VAE +
AR / 8 seconds; that is the bound. Prints JSON lines; the code is 1 when a request failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from deploy import add_flags
from load import Answered, Level, has_failed, own_load, steady_load, steady_rate
from measure import say
from served import PROMPT, served

AR_TOGETHER = 8
"""Sequences that the first stage decodes in the time of one: its ``max_num_seqs``."""

AR, DIT, VAE = ("prefill", "decode"), ("condition", "denoise"), ("vae",)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stream.py", description="Measures a steady stream of requests.")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--model-repository", type=Path, metavar="DIR", help="as serve has it")
    parser.add_argument("--size", default="256x256", metavar="WxH", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--concurrency", type=int, default=12, help="requests in flight (%(default)s)")
    parser.add_argument("--warm-ups", type=int, default=2, help="answers that are not counted (%(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="answers that are (%(default)s)")
    parser.add_argument("--alone", type=int, default=2, help="requests sent one after the other (%(default)s)")
    add_flags(parser)
    flags = parser.parse_args(arguments)
    flags.url = None
    return flags


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    width, height = (int(side) for side in flags.size.split("x"))
    request: dict[str, Any] = {"prompt": PROMPT, "width": width, "height": height, "num_inference_steps": flags.steps}
    request["output_format"] = "png"
    started = time.monotonic()
    with served(flags) as server:
        say("start to ready", seconds=time.monotonic() - started, mps=flags.mps)
        alone = own_load(server.grpc_url, "grpc", [{**request, "seed": 1}], Level("concurrency", 1, flags.alone + 1))
        if has_failed(alone):
            return 1
        say("alone", size=flags.size, steps=flags.steps, mps=flags.mps, **stages(alone[1:]), requests=flags.alone)
        answers = steady_load(
            f"grpc://{server.grpc_url}",
            lambda client, seed: client.generate(**request, seed=seed),
            flags.concurrency,
            flags.warm_ups + flags.requests,
        )
        if has_failed(answers):
            return 1
        say_stream(flags, stages(alone[1:]), answers[flags.warm_ups :])
    return 0


def stages(answers: list[Answered]) -> dict[str, float]:
    """The mean seconds of the parts that the bound is made of."""
    told = [one.metadata["seconds"] for one in answers]
    parts = {"ar_seconds": AR, "dit_seconds": DIT, "vae_seconds": VAE}
    return {name: sum(one[stage] for one in told for stage in part) / len(told) for name, part in parts.items()}


def say_stream(flags: argparse.Namespace, alone: dict[str, float], answers: list[Answered]) -> None:
    """Says what came of it: pictures a second between the first answer and the last, against the bound."""
    named: dict[str, Any] = {"size": flags.size, "steps": flags.steps, "mps": flags.mps}
    say("in the stream", **named, **stages(answers), requests=len(answers))
    rate = steady_rate(answers)
    bound = 1 / (alone["dit_seconds"] + alone["vae_seconds"] + alone["ar_seconds"] / AR_TOGETHER)
    say(
        "steady stream",
        **named,
        concurrency=flags.concurrency,
        requests=len(answers),
        pictures_per_second=rate,
        seconds_per_picture=1 / rate,
        bound_per_second=bound,
        to_bound=rate / bound,
    )


if __name__ == "__main__":
    sys.exit(main())

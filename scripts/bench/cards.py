"""Measures stages on cards of their own, each through a server: several painters, and both stages pipelined.

    cards.py painters --checkpoint FULL --dummy --devices cuda:0,cuda:1 --size 1024x1024
    cards.py pipeline --checkpoint FULL --dummy --devices cuda:0,cuda:1 --size 1024x1024

``painters`` serves the second stage alone, with tokens given: an instance on the first device, then, by a server anew,
an instance on each; the same number of requests is kept in flight, and the seconds of each card's own steps are told,
for cards of one kind differ. ``pipeline`` puts the first stage on the first device and the second on the second; it
measures each alone, the first with a request that fills its slots, the second with a steady stream of given tokens, and
then a steady stream through both, against the slower stage. Prints JSON lines; the code is 1 when a request failed.
Without --checkpoint a tiny one is served; CPU cards (cpu:0,cpu:1, the default) compute with a thread each.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from deploy import repository_with
from load import Answered, has_failed, steady_load, steady_rate
from measure import say
from served import DRAIN_SECONDS, PROMPT, tiny_checkpoint

from capacity_planner.times import read_size
from glm_image.dit.metrics import STEP_SECONDS
from glm_image.request.geometry import Size, generated_size, target_grid
from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient, PriorTokens

TOKEN_VALUES = 64
"""Of the given tokens: fewer than any codebook has."""

SLOTS = 8
"""Sequences that the first stage decodes together: its ``max_num_seqs``."""

METRICS_SECONDS = 10


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cards.py", description="Measures stages on cards of their own.")
    parser.add_argument("what", choices=("painters", "pipeline"))
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a tiny one of random weights")
    parser.add_argument("--dummy", action="store_true", help="random weights of the checkpoint's sizes")
    parser.add_argument("--devices", default="cpu:0,cpu:1", help="with commas between them (%(default)s)")
    parser.add_argument("--size", default="128x128", metavar="WxH", help="of the pictures (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight (%(default)s)")
    parser.add_argument("--warm-ups", type=int, default=2, help="answers that are not counted (%(default)s)")
    parser.add_argument("--requests", type=int, default=8, help="answers that are, of each painter (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    devices = flags.devices.split(",")
    with nullcontext(flags.checkpoint) if flags.checkpoint else tiny_checkpoint() as checkpoint:
        say("cards", what=flags.what, devices=devices, size=flags.size, steps=flags.steps)
        measure = measure_painters if flags.what == "painters" else measure_pipeline
        return 1 if measure(checkpoint, devices, flags) is None else 0


@contextmanager
def served(checkpoint: Path, flags: argparse.Namespace, **devices: list[str]) -> Iterator[TritonServer]:
    """Stages with an instance on each of their devices, for as long as they are measured; the ensemble with both."""
    parameters = [f"{model}.devices={';'.join(places)}" for model, places in devices.items()]
    if flags.dummy:
        parameters += [f"{model}.load_format=dummy" for model in devices]
    started = time.monotonic()
    with (
        repository_with(None, parameters, next(iter(devices)) if len(devices) == 1 else "*") as repository,
        TritonServer(checkpoint, model_repository=repository, drain_seconds=DRAIN_SECONDS) as server,
    ):
        say("start to ready", seconds=time.monotonic() - started, **devices)
        yield server


def given_tokens(size: Size) -> PriorTokens:
    """Tokens that no first stage has drawn; painting takes as long whatever they are."""
    grid = target_grid(generated_size(size))
    return PriorTokens(
        prior_token_ids=np.arange(grid.tokens, dtype=np.int32)[None] % TOKEN_VALUES,
        prior_grid=np.array(grid, dtype=np.int32),
        source_token_ids=np.zeros(0, dtype=np.int32),
        source_grids=np.zeros((0, 2), dtype=np.int32),
        resolved_seed=np.zeros(1, dtype=np.int64),
        resolved_size=np.array(size, dtype=np.int32),
        deadline_ns=np.zeros(1, dtype=np.int64),
        ar_metadata={},
    )


def painting_rate(server: TritonServer, painters: int, flags: argparse.Namespace) -> float | None:
    """Says and returns the pictures a second of the second stage alone; None where a request failed."""
    prior = given_tokens(read_size(flags.size))
    answers = steady_load(
        f"grpc://{server.grpc_url}",
        lambda client, seed: client.paint(PROMPT, prior, seed=seed, num_inference_steps=flags.steps),
        flags.concurrency,
        flags.warm_ups + flags.requests * painters,
    )
    return None if has_failed(answers) else say_rate("glm_dit alone", answers[flags.warm_ups :], painters, flags)


def say_rate(name: str, answers: list[Answered], painters: int, flags: argparse.Namespace) -> float:
    rate = steady_rate(answers)
    say(name, painters=painters, concurrency=flags.concurrency, requests=len(answers), pictures_per_second=rate)
    return rate


def say_painters(server: TritonServer, places: list[str], steps: int) -> float:
    """Says how fast each painter's card was, and returns what all of them would paint if they did nothing but steps."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=METRICS_SECONDS) as answer:
        metrics = answer.read().decode()
    pictures_per_second = 0.0
    for index, place in enumerate(places):
        total, count = (
            float(re.findall(rf'^{STEP_SECONDS.name}_{part}{{.*instance="{index}".*}} (.+)$', metrics, re.MULTILINE)[0])
            for part in ("sum", "count")
        )
        say("a painter", device=place, step_seconds=total / count, steps=int(count))
        pictures_per_second += count / total / steps
    return pictures_per_second


def measure_painters(checkpoint: Path, devices: list[str], flags: argparse.Namespace) -> float | None:
    """Says what several painters give against one; None where a request failed."""
    rates, steps_alone = [], 0.0
    for places in (devices[:1], devices):
        with served(checkpoint, flags, glm_dit=places) as server:
            rate = painting_rate(server, len(places), flags)
            if rate is None:
                return None
            steps_alone = say_painters(server, places, flags.steps)
        rates.append(rate)
    named = {"painters": len(devices), "steps": flags.steps, "size": flags.size}
    say("several painters", **named, speedup=rates[1] / rates[0], to_steps_of_each=rates[1] / steps_alone)
    return rates[1]


def decoding_rate(server: TritonServer, flags: argparse.Namespace) -> float:
    """Says and returns the pictures a second of the first stage alone, its slots full."""
    size = read_size(flags.size)
    with GlmImageClient(f"grpc://{server.grpc_url}") as client:
        client.prior_tokens(PROMPT, height=64, width=64, seed=0)  # what is loaded at first use
        started = time.monotonic()
        client.prior_tokens(PROMPT, height=size.height, width=size.width, seed=0, num_images=SLOTS)
        seconds = time.monotonic() - started
    say("glm_ar alone", slots=SLOTS, seconds=seconds, pictures_per_second=SLOTS / seconds)
    return SLOTS / seconds


def measure_pipeline(checkpoint: Path, devices: list[str], flags: argparse.Namespace) -> float | None:
    """Says what both stages give together, against the slower one; None where a request failed."""
    first, second = devices
    size = read_size(flags.size)
    request = {"height": size.height, "width": size.width, "num_inference_steps": flags.steps}
    with served(checkpoint, flags, glm_ar=[first], glm_dit=[second]) as server:
        decoding, painting = decoding_rate(server, flags), painting_rate(server, 1, flags)
        if painting is None:
            return None
        answers = steady_load(
            f"grpc://{server.grpc_url}",
            lambda client, seed: client.generate(PROMPT, seed=seed, **request),  # type: ignore[arg-type]
            flags.concurrency,
            flags.concurrency + flags.requests,
        )
    if has_failed(answers):
        return None
    # The first ones have decoded together, before there was anything to paint.
    rate = say_rate("both stages", answers[flags.concurrency :], 1, flags)
    slower = "glm_ar" if decoding < painting else "glm_dit"
    say("pipelined", slower=slower, to_slower=rate / min(decoding, painting), steps=flags.steps, size=flags.size)
    return rate


if __name__ == "__main__":
    sys.exit(main())

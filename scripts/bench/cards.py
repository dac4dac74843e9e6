#!/usr/bin/env python3
"""Measures stages on devices of their own, each through a server: DiT instances, and both stages as a pipeline.

    scripts/bench/cards.py instances --checkpoint FULL --dummy --devices cuda:0,cuda:1 --size 1024x1024
    scripts/bench/cards.py pipeline --checkpoint FULL --dummy --devices cuda:0,cuda:1 --size 1024x1024

``instances`` serves ``glm_dit`` alone, with given tokens: one instance on the first device, then, with a new server,
one on each. The same number of requests is kept in flight. As devices of one kind differ in speed, the seconds of each
one's own steps are reported too. ``pipeline`` puts ``glm_ar`` on the first device and ``glm_dit`` on the second; it
measures each alone, the first with a request that fills its slots, the second with a steady stream of given tokens,
then a steady stream through both, against the slower stage. Prints JSON lines; the exit code is 1 if a request failed.

CPU devices (cpu:0,cpu:1, the default) compute with one thread each. With --url, no server is started: ``instances``
measures that server alone, whose metrics are at --metrics-url.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ceilings import report_ceilings_of
from deploy import repository_with
from load import Response, has_failed, steady_load, steady_rate
from measure import PROMPT, parse, report, size_name
from served import DRAIN_SECONDS, checkpoint_of, server_parser

from glm_image.dit.metrics import STEP_SECONDS
from glm_image.request.geometry import Size, generated_size, target_grid
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image_client import GlmImageClient, PriorTokens

TOKEN_VALUES = 64
"""Different given tokens: fewer than any codebook has."""

SLOTS = 8
"""Sequences that the AR decodes together: its ``max_num_seqs``."""

METRICS_SECONDS = 10
BRIEF = {"sizes": "64x64", "steps": 2, "concurrency": 3, "warm_ups": 1, "requests": 4}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = server_parser("cards.py", __doc__, "128x128", steps=20)
    parser.add_argument("what", choices=("instances", "pipeline"))
    parser.add_argument("--metrics-url", metavar="HOST:PORT", default="127.0.0.1:8002", help="(%(default)s)")
    parser.add_argument("--dummy", action="store_true", help="random weights of the checkpoint's sizes")
    parser.add_argument("--devices", default="cpu:0,cpu:1", help="with commas between (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight (%(default)s)")
    parser.add_argument("--warm-ups", type=int, default=2, help="responses that are not counted (%(default)s)")
    parser.add_argument("--requests", type=int, default=8, help="counted responses of each instance (%(default)s)")
    return parse(parser, arguments, BRIEF)


class Urls(NamedTuple):
    """Where a server listens."""

    grpc_url: str
    metrics_url: str


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    devices = flags.devices.split(",")
    report("cards", what=flags.what, devices=devices, size=size_name(flags.sizes[0]), steps=flags.steps)
    measure = measure_instances if flags.what == "instances" else measure_pipeline
    if flags.url:
        return 1 if measure(None, devices, flags) is None else 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report_ceilings_of(devices[0], brief=flags.brief)
    with checkpoint_of(flags) as checkpoint:
        return 1 if measure(checkpoint, devices, flags) is None else 0


@contextmanager
def served(checkpoint: Path | None, flags: argparse.Namespace, **devices: list[str]) -> Iterator[Urls]:
    """Serves stages with an instance on each of their devices, and the ensemble with both; or yields ``--url``."""
    if checkpoint is None:
        yield Urls(flags.grpc_url, flags.metrics_url)
        return
    parameters = [f"{model}.devices={';'.join(places)}" for model, places in devices.items()]
    if flags.dummy:
        parameters += [f"{model}.load_format=dummy" for model in devices]
    models = next(iter(devices)) if len(devices) == 1 else "*"
    started = time.monotonic()
    with (
        repository_with(flags.model_repository, [*parameters, *flags.parameter], models) as repository,
        TritonServer(ServerSettings(checkpoint, model_repository=repository, drain_seconds=DRAIN_SECONDS)) as server,
    ):
        report("start to ready", seconds=time.monotonic() - started, **devices)
        yield Urls(server.grpc_url, server.metrics_url)


def given_tokens(size: Size) -> PriorTokens:
    """Returns tokens that no AR has sampled; denoising takes as long with any."""
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


def dit_rate(server: Urls, instances: int, flags: argparse.Namespace) -> float | None:
    """Reports and returns the images a second of the DiT alone; None if a request failed."""
    prior = given_tokens(flags.sizes[0])
    responses = steady_load(
        f"grpc://{server.grpc_url}",
        lambda client, seed: client.paint(PROMPT, prior, seed=seed, num_inference_steps=flags.steps),
        flags.concurrency,
        flags.warm_ups + flags.requests * instances,
    )
    return (
        None if has_failed(responses) else report_rate("glm_dit alone", responses[flags.warm_ups :], instances, flags)
    )


def report_rate(name: str, responses: Sequence[Response], instances: int, flags: argparse.Namespace) -> float:
    rate = steady_rate(responses)
    named = {"instances": instances, "concurrency": flags.concurrency, "requests": len(responses)}
    report(name, **named, pictures_per_second=rate)
    return rate


def report_instances(server: Urls, places: Sequence[str], steps: int) -> float:
    """Reports the step time of each instance; returns the images a second that they would give by steps alone."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=METRICS_SECONDS) as response:
        metrics = response.read().decode()
    pictures_per_second = 0.0
    for index, place in enumerate(places):
        total, count = (
            float(re.findall(rf'^{STEP_SECONDS.name}_{part}{{.*instance="{index}".*}} (.+)$', metrics, re.MULTILINE)[0])
            for part in ("sum", "count")
        )
        report("an instance", device=place, step_seconds=total / count, steps=int(count))
        pictures_per_second += count / total / steps
    return pictures_per_second


def measure_instances(checkpoint: Path | None, devices: list[str], flags: argparse.Namespace) -> float | None:
    """Several DiT instances against one; None if a request failed."""
    rates, steps_alone = [], 0.0
    for places in (devices[:1], devices) if checkpoint else (devices,):
        with served(checkpoint, flags, glm_dit=places) as server:
            rate = dit_rate(server, len(places), flags)
            if rate is None:
                return None
            steps_alone = report_instances(server, places, flags.steps)
        rates.append(rate)
    named = {"instances": len(devices), "steps": flags.steps, "size": size_name(flags.sizes[0])}
    report("several instances", **named, speedup=rates[-1] / rates[0], to_steps_of_each=rates[-1] / steps_alone)
    return rates[-1]


def ar_rate(server: Urls, flags: argparse.Namespace) -> float:
    """Reports and returns the images a second of the AR alone, its slots full."""
    size = flags.sizes[0]
    with GlmImageClient(f"grpc://{server.grpc_url}") as client:
        client.prior_tokens(PROMPT, height=64, width=64, seed=0)  # loads what is used first
        started = time.monotonic()
        client.prior_tokens(PROMPT, height=size.height, width=size.width, seed=0, num_images=SLOTS)
        seconds = time.monotonic() - started
    report("glm_ar alone", slots=SLOTS, seconds=seconds, pictures_per_second=SLOTS / seconds)
    return SLOTS / seconds


def measure_pipeline(checkpoint: Path | None, devices: list[str], flags: argparse.Namespace) -> float | None:
    """Both stages together, against the slower one; None if a request failed."""
    first, second = devices
    size = flags.sizes[0]
    with served(checkpoint, flags, glm_ar=[first], glm_dit=[second]) as server:
        ar, dit = ar_rate(server, flags), dit_rate(server, 1, flags)
        if dit is None:
            return None
        responses = steady_load(
            f"grpc://{server.grpc_url}",
            lambda client, seed: client.generate(
                PROMPT, seed=seed, height=size.height, width=size.width, num_inference_steps=flags.steps
            ),
            flags.concurrency,
            flags.concurrency + flags.requests,
        )
    if has_failed(responses):
        return None
    # The first requests were decoded together, before there was anything to denoise.
    rate = report_rate("both stages", responses[flags.concurrency :], 1, flags)
    slower = "glm_ar" if ar < dit else "glm_dit"
    named = {"slower": slower, "steps": flags.steps, "size": size_name(size)}
    report("pipelined", **named, to_slower=rate / min(ar, dit))
    return rate


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures instances that span several devices against one device, in one run. Prints JSON lines.

For two GPUs and the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/parallel.py --checkpoint FULL --device cuda:0,cuda:1

``--device cpu,cpu`` runs the ranks as processes over gloo, at 256x256; every engine starts one, which takes seconds.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from ar import SLOTS, STEPS_A_COMMAND, admit, grids_of
from images import GUIDANCE, dit_request, grid_of, render
from measure import engine_parser, parse, report, size_name
from timing import CommandClock, open_benchmark_device, release, report_ceilings, report_kernels, seconds, synchronizer

from capacity_planner.times import PEER_MEMORY
from glm_image.ar.commands import Release, Step
from glm_image.ar.config import ArConfig
from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.parallel.rank_group import WorkerConfig
from glm_image.request.geometry import Size, rendered_size

logger = logging.getLogger(__name__)

STEPS_BEFORE = 3
"""Steps of an image that are not timed: one of them is captured."""

LOAD_SECONDS = 120.0
COMMANDS_A_LOG_LINE = 4
HOST_SIZE = "256x256"
SIZE = "1024x1024,2048x2048"
BRIEF = {"sizes": "64x64", "steps": 5, "parallel": "cfg=2", "repeats": 1}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    given = list(sys.argv[1:] if arguments is None else arguments)
    size = HOST_SIZE if any("cpu" in argument for argument in given) else SIZE
    parser = engine_parser("parallel.py", __doc__, size)
    parser.add_argument("--stages", default="ar,dit", help="(%(default)s)")
    parser.add_argument("--profile", action="store_true", help="also report the kernels of some decode steps")
    parser.add_argument("--parallel", default="cfg=2;ulysses=2;ring=2;tp=2", help="with semicolons between")
    parser.add_argument("--steps", type=int, default=15, help=f"of an image, above {STEPS_BEFORE} (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of a decode step, a median (%(default)s)")
    flags = parse(parser, given, BRIEF)
    if flags.steps <= STEPS_BEFORE:
        parser.error(f"--steps is {flags.steps}; allowed: {STEPS_BEFORE + 1} or more")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")  # the progress of each rank's start
    checkpoint, devices = Checkpoint.open(flags.checkpoint, flags.load_format), flags.device.split(",")
    report_ceilings(open_benchmark_device(devices[0]), brief=flags.brief)
    if len(devices) > 1 and devices[0].startswith("cpu"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the other ranks, which share the cores
    report("devices", count=len(devices), names=devices)
    if "ar" in flags.stages.split(","):
        measure_decoder(checkpoint, devices, flags)
    if "dit" in flags.stages.split(","):
        measure_dit(checkpoint, devices, flags)
    return 0


def decode_seconds(
    checkpoint: Checkpoint, devices: Sequence[str], settings: ArSettings, flags: argparse.Namespace
) -> float:
    """Returns the median time of a decode step with all slots running, halfway through the first size."""
    device, size = open_benchmark_device(devices[0]), flags.sizes[0]
    engine = ArEngine(checkpoint, device, settings, workers=workers_on(devices[1:]))
    engine.close_scheduler()  # the executor is this thread's from here on
    executor, config = engine.executor, ArConfig.read(checkpoint)
    for slot in range(SLOTS):
        admit(executor, config, slot, size, seed=slot)
    total = sum(grid.tokens for grid in grids_of(size))
    # Waits now and then for the devices, as serving does.
    commands = total * 15 // 32 // STEPS_A_COMMAND
    for index in range(commands):
        executor.run(Step(STEPS_A_COMMAND))
        if index % COMMANDS_A_LOG_LINE == 0:
            logger.info("%d of %d decode steps before the timed ones", (index + 1) * STEPS_A_COMMAND, total * 15 // 32)
    work = lambda: executor.run(Step(STEPS_A_COMMAND))  # noqa: E731
    times = [seconds(work, synchronizer(device), repeats=1, warm_ups=0) for _ in range(flags.repeats)]
    if flags.profile:
        report_kernels(work, device)
    for slot in range(SLOTS):
        executor.run(Release(slot))
    engine.close()
    release(device)
    return statistics.median(times) / STEPS_A_COMMAND


def workers_on(devices: Sequence[str]) -> WorkerConfig:
    """Returns the other ranks of an instance."""
    return WorkerConfig(tuple(devices), load_seconds=LOAD_SECONDS)


def measure_decoder(checkpoint: Checkpoint, devices: Sequence[str], flags: argparse.Namespace) -> None:
    """A decode step on one device, then on all of them with each kind of exchange."""
    alone = decode_seconds(checkpoint, devices[:1], ArSettings(speculation="none"), flags)
    named = {"size": size_name(flags.sizes[0]), "running": SLOTS}
    report("decode step", devices=1, **named, ms=alone * 1e3)
    # The ranks of a CPU have no memory of each other's.
    exchanges = {"collectives": False} if devices[0].startswith("cpu") else {PEER_MEMORY: True, "collectives": False}
    for through, peer_memory in exchanges.items() if len(devices) > 1 else ():
        took = decode_seconds(checkpoint, devices, ArSettings(peer_memory=peer_memory, speculation="none"), flags)
        report("decode step", devices=len(devices), **named, through=through, ms=took * 1e3, speedup=alone / took)


def measure_dit(checkpoint: Checkpoint, devices: Sequence[str], flags: argparse.Namespace) -> None:
    """A denoising step on one device, then on all of them with each kind of parallelism."""
    alone: dict[Size, float] = {}
    for parallel in ["none", *(flags.parallel.split(";") if len(devices) > 1 else ())]:
        used = devices[:1] if parallel == "none" else devices
        logger.info("denoising on %d devices, parallel %s", len(used), parallel)
        for size, took in denoising_seconds(checkpoint, used, parallel, flags).items():
            alone.setdefault(size, took)
            figures: dict[str, Any] = {"ms": took * 1e3, "speedup": alone[size] / took}
            report("denoising step", devices=len(used), parallel=parallel, size=size_name(size), **figures)


def denoising_seconds(
    checkpoint: Checkpoint, devices: Sequence[str], parallel: str, flags: argparse.Namespace
) -> dict[Size, float]:
    """Returns the median time of a denoising step with guidance at each size, once it is captured."""
    device = open_benchmark_device(devices[0])
    clock = CommandClock(device)
    grids = {size: grid_of(size) for size in flags.sizes}
    settings = DitSettings(parallel=parallel, warmup_sizes=tuple(rendered_size(grid) for grid in grids.values()))
    engine = DitEngine(checkpoint, device, settings, workers=workers_on(devices[1:]), watched=clock.wrap)
    found = {}
    for size, grid in grids.items():
        clock.take()
        render(engine, dit_request(grid, flags.steps, engine.codebook_size, GUIDANCE))
        times = clock.take()[Step.__name__]
        found[size] = statistics.median(step.whole for step in times[STEPS_BEFORE:])
    engine.close()
    release(device)
    return found


if __name__ == "__main__":
    sys.exit(main())

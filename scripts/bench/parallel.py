"""Measures instances that span several devices against one device, in one run.

Prints JSON lines. For two GPUs and the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/parallel.py --checkpoint FULL --device cuda:0,cuda:1
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from typing import Any

import torch
from measure import arguments, say, say_kernels

from capacity_planner.times import OWN_SUM
from glm_image.ar.commands import Admit, Release, Step
from glm_image.ar.config import ArConfig
from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.dit.commands import Drop, Prepare
from glm_image.dit.commands import Step as DenoisingStep
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.parallel.rank_group import WorkerConfig
from glm_image.request.geometry import Grid, Size, generated_size, output_grids, target_grid

PROMPT = "A red fox reading a newspaper that says 'NEWS'"
PROMPT_TOKENS = 64
SLOTS = 8
DRAWN_BEFORE = 592
STEPS_A_COMMAND = 16
ROUNDS = 7
STEPS_BEFORE = 3
"""Of a picture, in which a step is captured."""
LOAD_SECONDS = 120.0


def decode_seconds(checkpoint: Checkpoint, devices: list[str], settings: ArSettings, *, profiled: bool) -> float:
    """Returns the median time of a decode step with all slots running, after 592 tokens of 1024x1024.

    If ``profiled``, prints the kernels of a command's steps on the first device.
    """
    engine = ArEngine(
        checkpoint, open_device(devices[0]), settings, peers=WorkerConfig(tuple(devices[1:]), load_seconds=LOAD_SECONDS)
    )
    engine.close_scheduler()
    run, config = engine.executor.run, ArConfig.read(checkpoint)
    ids = tuple(config.vision_vocab_size + index for index in range(PROMPT_TOKENS))
    grids = output_grids(Grid(32, 32), image_to_image=False)
    for slot in range(SLOTS):
        run(Admit(slot, ids, grids, config.sampling, slot))
    for _ in range(DRAWN_BEFORE // STEPS_A_COMMAND):  # waits now and then for the devices, as serving does
        run(Step(STEPS_A_COMMAND))
    tokens, times = [], []
    for _ in range(ROUNDS):
        synchronize(devices[0])
        started = time.perf_counter()
        run(Step(STEPS_A_COMMAND))
        synchronize(devices[0])
        times.append((time.perf_counter() - started) / STEPS_A_COMMAND)
    if profiled:
        say_kernels(lambda: run(Step(STEPS_A_COMMAND)), lambda: synchronize(devices[0]))
    tokens = [run(Release(slot)) for slot in range(SLOTS)]
    assert all(row is not None for row in tokens)
    engine.executor.close()
    return statistics.median(times)


def denoising_seconds(engine: DitEngine, grid: Grid, device: str, steps: int, *, profiled: bool) -> float:
    """Returns the time of a denoising step, guidance 1.5, once it is captured.

    If ``profiled``, prints the kernels of the last step on the first device.
    """
    tokens = torch.arange(grid.tokens, dtype=torch.int32).remainder(engine.codebook_size).numpy()
    run = engine.executor.run
    run(Prepare(0, PROMPT, "", tokens, grid, steps, 1.5, 7))
    for _ in range(STEPS_BEFORE):
        run(DenoisingStep(0))
    synchronize(device)
    timed = steps - STEPS_BEFORE - profiled
    started = time.perf_counter()
    for _ in range(timed):
        run(DenoisingStep(0))
    synchronize(device)
    took = (time.perf_counter() - started) / timed
    if profiled:
        say_kernels(lambda: run(DenoisingStep(0)), lambda: synchronize(device))
    run(Drop(0))
    return took


def synchronize(device: str) -> None:
    """Waits for a device of this process."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def measure_decoder(checkpoint: Checkpoint, devices: list[str], *, profiled: bool) -> None:
    """One device, then all of them with each way of exchanging."""
    alone = decode_seconds(checkpoint, devices[:1], ArSettings(), profiled=profiled)
    say("decode step", devices=1, running=SLOTS, ms=alone * 1e3)
    clear()
    for peer_memory in (True, False):
        took = decode_seconds(checkpoint, devices, ArSettings(peer_memory=peer_memory), profiled=profiled)
        how = OWN_SUM if peer_memory else "collectives"
        say("decode step", devices=len(devices), through=how, ms=took * 1e3, speedup=alone / took)
        clear()


def measure_painter(checkpoint: Checkpoint, devices: list[str], flags: argparse.Namespace) -> None:
    """One device, then all of them with each way of sharing a step."""
    grids = [target_grid(generated_size(size)) for size in flags.sizes]
    alone: dict[Grid, float] = {}
    for parallel in ["none", *flags.parallel.split(";")]:
        used = devices[:1] if parallel == "none" else devices
        settings = DitSettings(parallel=parallel, warmup_sizes=(Size(1024, 1024),) if devices[0] != "cpu" else ())
        engine = DitEngine(
            checkpoint, open_device(used[0]), settings, peers=WorkerConfig(tuple(used[1:]), load_seconds=LOAD_SECONDS)
        )
        for grid in grids:
            took = denoising_seconds(engine, grid, used[0], flags.steps, profiled=flags.profile)
            alone.setdefault(grid, took)
            size = f"{grid.width * 32}x{grid.height * 32}"
            figures: dict[str, Any] = {"ms": took * 1e3, "speedup": alone[grid] / took}
            say("denoising step", devices=len(used), parallel=parallel, size=size, **figures)
        engine.close()
        del engine
        clear()


def clear() -> None:
    """Gives back what the last engine held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse_size(text: str) -> Size:
    """Reads WIDTHxHEIGHT."""
    width, height = text.split("x")
    return Size(int(height), int(width))


def main(flags: argparse.Namespace) -> None:
    """Runs all measures."""
    checkpoint, devices = Checkpoint.open(flags.checkpoint, flags.load_format), flags.device.split(",")
    name = torch.cuda.get_device_name(devices[0]) if devices[0] != "cpu" else "cpu"
    say("devices", count=len(devices), name=name, torch=torch.__version__)
    if "ar" in flags.stages:
        measure_decoder(checkpoint, devices, profiled=flags.profile)
    if "dit" in flags.stages:
        measure_painter(checkpoint, devices, flags)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--stages", default="ar,dit", help="which (%(default)s)")
    parser.add_argument(
        "--profile", action="store_true", help="also print the kernels of 16 decode and 1 denoising step"
    )
    parser.add_argument("--parallel", default="cfg=2;ulysses=2;ring=2;tp=2", help="with semicolons between")
    parser.add_argument("--steps", type=int, default=15, help="of a picture")
    parser.add_argument(
        "--sizes",
        default=[Size(1024, 1024), Size(2048, 2048)],
        type=lambda text: [parse_size(part) for part in text.split(",")],
        help="WIDTHxHEIGHT, with commas between them",
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")  # how far each rank is
    flags = parser.parse_args()
    fewest = STEPS_BEFORE + 1 + flags.profile
    if flags.steps < fewest:
        parser.error(f"--steps: {flags.steps} leaves none to time; allowed: {fewest} or more")
    main(flags)

#!/usr/bin/env python3
"""Models the time of both stages on an Ascend 910B3 from what they launch. Prints JSON lines. A prediction, no measure.

    scripts/make_tiny_checkpoint.py FULL --preset full --weights none
    scripts/npu_standin -- scripts/bench/npu_model.py --checkpoint FULL

The stand-in for CANN records the launches of one and of two layers with their shapes, at the real sizes and without
computing them. A launch takes as long as the slower of its bytes over the memory's bandwidth and its arithmetic over
the rate of products, plus a fixed cost; see ``npu_cost.py``. What the model leaves out: the time of sorts and of other
work on vector units beyond its bytes, copies that CANN adds, and waits of the host.

``--card nvidia-h200`` applies the same form to the ceilings of an H200, and compares with the measured steps. The lines
have the names of measured ones, so that ``scripts/plan --measured`` reads them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from images import grid_of
from measure import engine_parser, parse, report, size_name
from npu_cost import ASCEND_910B3, H200, PRODUCTS, Card, Cost, Launch, cost, largest, of_events, whole_model
from recordings import GUIDANCE, Workload, only_small_launches, record_ar, record_dit
from timing import open_benchmark_device

from glm_image.ar.config import ArConfig
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.request import geometry
from glm_image.request.geometry import Grid

CARDS = {"ascend-910b3": ASCEND_910B3, "nvidia-h200": H200}
STEPS = 50
RESULTS = Path(__file__).parent / "results"
PER_RANK = (*PRODUCTS, "aclnnWeightQuantBatchMatmulV2", "aclnnFusedInferAttentionScoreV3", "aclnnInplaceScatterUpdate")
"""Launches of a decode step that ranks share; the others run on each."""


class Recording(NamedTuple):
    """The launches of whole models."""

    decode: Counter[Launch]
    prefill: Counter[Launch]
    denoise: Counter[Launch]
    vae: Counter[Launch]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("npu_model.py", __doc__)
    parser.add_argument("--quantization", default="none", choices=("none", "int8"), help="(%(default)s)")
    parser.add_argument("--card", default="ascend-910b3", choices=CARDS, help="(%(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="sequences that decode together (%(default)s)")
    parser.add_argument("--positions", type=int, default=8192, help="of the KV cache of each (%(default)s)")
    return parse(parser, arguments, {"checkpoint": None})


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device, card = open_benchmark_device(flags.device), CARDS[flags.card]
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    report("model", card=flags.card, source=card.source, quantization=flags.quantization, is_modelled=True)
    layers = ArConfig.read(checkpoint).layers, int(checkpoint.config("transformer")["num_layers"])
    for size in flags.sizes:
        grid = grid_of(size)
        preview, *_ = geometry.output_grids(grid, image_to_image=False)
        work = Workload(flags.slots, flags.positions, 64, grid, preview, quantization=flags.quantization)
        with only_small_launches():
            recording = record(checkpoint, device, work, layers)
        step, denoise = report_image(recording, card, grid, flags.quantization)
        if flags.card == "nvidia-h200":
            compare(step, denoise)
        else:
            report_cards(recording, card, layers, size_name(grid))
    return 0


def record(checkpoint: Checkpoint, device: Device, work: Workload, layers: tuple[int, int]) -> Recording:
    ar, dit = ([function(checkpoint, device, work, count) for count in (1, 2)] for function in (record_ar, record_dit))

    def whole(recorded: list[Any], part: str, count: int) -> Counter[Launch]:
        one, two = (of_events(events[part]) for events in recorded)
        return whole_model(one, two, count)

    vae = Counter(of_events(dit[0]["vae"]))
    return Recording(
        whole(ar, "decode", layers[0]), whole(ar, "prefill", layers[0]), whole(dit, "denoise", layers[1]), vae
    )


def report_image(recording: Recording, card: Card, grid: Grid, quantization: str) -> tuple[Cost, Cost]:
    """Reports the steps and an image of one card; returns the costs of a decode and of a denoising step."""
    common: dict[str, Any] = {"quantization": quantization, "is_modelled": True}
    step, prefill, denoise, vae = (cost(part, card) for part in recording)
    tokens = sum(part.tokens for part in geometry.output_grids(grid, image_to_image=False))
    for running in (1, 8):  # a step computes all slots, whatever runs in them
        report("decode step", size=grid.width * 32, running=running, ms=step.seconds * 1e3, **step.fields(), **common)
    report("admission of a 64-token prompt", lost_ms=prefill.seconds * 1e3, **prefill.fields(), **common)
    report("step of denoising", size=size_name(grid), ms=denoise.seconds * 1e3, **denoise.fields(), **common)
    report(
        "longest kinds of launches, ms",
        decode=largest(recording.decode, card),
        denoise=largest(recording.denoise, card),
    )
    report(
        f"picture, {STEPS} steps, guidance {GUIDANCE}",
        size=size_name(grid),
        ar_seconds=prefill.seconds + tokens * step.seconds,
        denoise_seconds=STEPS * denoise.seconds,
        vae_seconds=vae.seconds,
        condition_seconds=0.0,
        **common,
    )
    return step, denoise


def report_cards(recording: Recording, card: Card, layers: tuple[int, int], size: str) -> None:
    """Reports steps over several cards: the AR tensor parallel, the DiT by branches and by tokens (Ulysses)."""
    ar_layers, blocks = layers
    one_step, one_denoise = cost(recording.decode, card).seconds, cost(recording.denoise, card).seconds
    for cards in (2, 4, 8):
        shared = cost(recording.decode, card, lambda launch, n=cards: 1 / n if launch.name in PER_RANK else 1.0)  # type: ignore[misc]
        seconds = shared.seconds + 2 * ar_layers * card.exchange
        report(
            "decode step",
            devices=cards,
            through="collectives",
            size=1024,
            ms=seconds * 1e3,
            speedup=one_step / seconds,
            is_modelled=True,
        )
        for parallel in (f"cfg=2,ulysses={cards // 2}" if cards > 2 else "cfg=2", f"ulysses={cards}"):
            seconds = _denoise_over(recording.denoise, card, blocks, parallel)
            report(
                "denoising step",
                devices=cards,
                parallel=parallel,
                size=size,
                ms=seconds * 1e3,
                speedup=one_denoise / seconds,
                is_modelled=True,
            )


def _denoise_over(counted: Counter[Launch], card: Card, blocks: int, parallel: str) -> float:
    """Returns the seconds of a step: its rows are shared, and with Ulysses q, k, v and the output are exchanged."""
    sizes = {name: int(size) for name, size in (part.split("=") for part in parallel.split(","))}
    branches, ranks = sizes.get("cfg", 1), sizes.get("ulysses", 1)
    seconds = cost(counted, card, lambda _: 1 / branches / ranks).seconds
    if ranks > 1:
        query = max(
            (launch.tensors[0] for launch in counted if "Attention" in launch.name), key=lambda found: found.bytes
        )
        sent = 4 * query.bytes / branches / ranks * (ranks - 1) / ranks
        seconds += blocks * (2 * card.exchange + sent / (card.link * (ranks - 1)))
    return seconds


def compare(step: Cost, denoise: Cost) -> None:
    """Compares with the steps that were measured on the card, of 1024x1024; they are fused in another way."""

    def measured(stage: str, name: str) -> dict[str, Any]:
        content = json.loads((RESULTS / f"nvidia-h200-{stage}.json").read_text(encoding="utf-8"))
        return next(line for line in content["measures"] if line["measure"].startswith(name))

    for name, found, modelled in (
        ("decode step", measured("ar", "decode step")["ms"], step.seconds * 1e3),
        ("denoising step", measured("dit", "picture")["denoise_seconds"] / STEPS * 1e3, denoise.seconds * 1e3),
    ):
        report(f"{name}, compared", measured_ms=found, modelled_ms=modelled, modelled_to_measured=modelled / found)


if __name__ == "__main__":
    sys.exit(main())

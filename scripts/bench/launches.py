#!/usr/bin/env python3
"""Counts what the steps of both stages launch on an NPU. Prints JSON lines.

    scripts/npu_standin -- scripts/bench/launches.py [--quantization int8]

Needs the stand-in for CANN, which logs every launch, copy and wait; a count says nothing about time. A launch is a call
of CANN: where an operand is not contiguous, CANN may add copies of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from measure import engine_parser, parse, report
from recordings import WAITS, Events, Workload, launches, record_ar, record_dit
from timing import open_benchmark_device

from glm_image.checkpoint.checkpoint import Checkpoint

STEPS = {"decode": "the decode step", "denoise": "the denoising step"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("launches.py", __doc__)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="(%(default)s)")
    parser.add_argument("--quantization", default="none", choices=("none", "int8"), help="(%(default)s)")
    return parse(parser, arguments, {})


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    work = Workload(dtype=flags.dtype, quantization=flags.quantization)
    for record in (record_ar, record_dit):
        one, two = (record(checkpoint, device, work, layers) for layers in (1, 2))
        for part in ("decode", "prefill", "denoise"):
            if part in one:
                _report_slope(part, *(_names(counts[part]) for counts in (one, two)))
        _report_replay("decode" if "decode" in one else "denoise", one["replay"])
        if "vae" in one:
            report("vae decode", launches=len(launches(one["vae"])))
    return 0


def _names(events: Events) -> list[str]:
    return [event["name"] for event in launches(events)]


def _report_slope(part: str, one: list[str], two: list[str]) -> None:
    """Reports the launches of a layer: the difference of a model with two and a model with one."""
    layer = Counter(two) - Counter(one)
    report(
        part,
        launches_a_layer=len(two) - len(one),
        launches_outside=2 * len(one) - len(two),
        layer=dict(layer.most_common()),
        outside=dict((Counter(one) - layer).most_common()),
    )


def _report_replay(part: str, replay: Events) -> None:
    report(
        f"replay of {STEPS[part]}",
        launches=len(launches(replay)),
        host_waits=sum(event["kind"] in WAITS for event in replay),
        host_copies=sum("host" in event["name"] for event in replay if event["kind"] == "launch"),
        allocations=sum(event["kind"] == "allocation" for event in replay),
    )


if __name__ == "__main__":
    sys.exit(main())

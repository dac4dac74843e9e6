#!/usr/bin/env python3
"""Counts what the steps of both stages launch on an NPU. Prints JSON lines.

    scripts/npu_standin -- scripts/bench/launches.py [--quantization int8]

Needs the stand-in for CANN, which logs every launch, copy and wait; a count says nothing about time. A launch is a call
of CANN: where an operand is not contiguous, CANN may add copies of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from measure import engine_parser, parse, report
from timing import open_benchmark_device

from glm_image.ar.commands import Admit, Step
from glm_image.ar.config import ArConfig
from glm_image.ar.executor import Executor
from glm_image.ar.model import Decoder
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.open import named_dtype
from glm_image.request.geometry import Grid

SLOTS, POSITIONS, PROMPT_TOKENS = 8, 512, 24
GRIDS = (Grid(8, 8), Grid(8, 8))
LAUNCHES = ("launch", "captured", "replay")
WAITS = ("wait", "host_access")

Events = list[dict[str, Any]]


@contextmanager
def recorded() -> Iterator[Events]:
    """Yields a list that has what the block did on the device when it ends.

    Raises:
        SystemExit: this process does not run on the stand-in.
    """
    try:
        library = ctypes.CDLL("libascendcl.so")
        library.standin_log_stop.restype = ctypes.c_char_p
    except (AttributeError, OSError):
        sys.exit("error: the launches are logged by the stand-in for CANN only: run scripts/npu_standin -- COMMAND")
    events: Events = []
    torch.npu.synchronize()  # type: ignore[attr-defined] - launches go through a queue
    library.standin_log_start()
    try:
        yield events
    finally:
        torch.npu.synchronize()  # type: ignore[attr-defined]
        events.extend(json.loads(line) for line in library.standin_log_stop().decode().splitlines())
        events.pop()  # the wait of this function


def launches(events: Events) -> list[str]:
    return [event["name"] for event in events if event["kind"] in LAUNCHES]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("launches.py", __doc__)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="(%(default)s)")
    parser.add_argument("--quantization", default="none", choices=("none", "int8"), help="(%(default)s)")
    return parse(parser, arguments, {})


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    counted = [_count_ar(checkpoint, device, flags, layers) for layers in (1, 2)]
    for part in ("decode", "prefill"):
        one, two = (counts[part] for counts in counted)
        _report_slope(part, launches(one), launches(two))
    replay = counted[0]["replay"]
    report(
        "replay of the decode step",
        launches=len(launches(replay)),
        host_waits=sum(event["kind"] in WAITS for event in replay),
        host_copies=sum("host" in event["name"] for event in replay if event["kind"] == "launch"),
        allocations=sum(event["kind"] == "allocation" for event in replay),
    )
    return 0


def _report_slope(part: str, one: list[str], two: list[str]) -> None:
    """Reports the launches of a layer: the difference of a decoder with two and a decoder with one."""
    layer = Counter(two) - Counter(one)
    report(
        part,
        launches_a_layer=len(two) - len(one),
        launches_outside=2 * len(one) - len(two),
        layer=dict(layer.most_common()),
        outside=dict((Counter(one) - layer).most_common()),
    )


def _count_ar(checkpoint: Checkpoint, device: Device, flags: argparse.Namespace, layers: int) -> dict[str, Events]:
    config = replace(ArConfig.read(checkpoint), layers=layers)
    source = checkpoint.tensors(
        "vision_language_encoder", device.torch_device, named_dtype(flags.dtype) or device.default_dtype
    )
    int8 = device.int8_product if flags.quantization == "int8" else None
    decoder = Decoder.load(config, source, int8=int8)
    with _recorded_captures(device) as step:
        executor = Executor(decoder, device, SLOTS, POSITIONS, capture=True)
    prefill = executor._prefill
    counted: dict[str, Events] = {"decode": step}

    def counted_prefill(*arguments: Any) -> Any:
        with recorded() as counted["prefill"]:
            return prefill(*arguments)

    executor._prefill = counted_prefill
    ids = tuple(config.vision_vocab_size + index for index in range(PROMPT_TOKENS))
    executor.run(Admit(0, ids, GRIDS, config.sampling, seed=0))
    executor.run(Step(1))
    with recorded() as counted["replay"]:
        executor._decode_step()  # type: ignore[misc]
    executor.close()
    return counted


@contextmanager
def _recorded_captures(device: Device) -> Iterator[Events]:
    """Yields a list to which every capture on the device adds what it records."""
    capture, captured = device.capture, []

    def recorded_capture(step: Callable[[], None], **options: Any) -> Callable[[], None]:
        with recorded() as events:
            replay = capture(step, **options)
        captured.extend(event for event in events if event["kind"] == "captured")
        return replay

    device.capture = recorded_capture  # type: ignore[method-assign]
    try:
        yield captured
    finally:
        del device.capture


if __name__ == "__main__":
    sys.exit(main())

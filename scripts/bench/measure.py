"""What the benchmarks share: the ceilings of the run's own device, timing, and JSON lines."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = 1 << 30
MATMUL_SIDE = 8192


def arguments(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with model_index.json")
    parser.add_argument("--load-format", default="dummy", choices=("dummy", "auto"), help="dummy: random weights")
    parser.add_argument("--device", default="auto")
    return parser


def say(measure: str, **values: Any) -> None:
    """Prints one measure as a JSON line."""
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps({"measure": measure, **rounded}), flush=True)


def seconds(work: Callable[[], object], synchronize: Callable[[], None], repeats: int = 5, warm_ups: int = 2) -> float:
    """Returns the median of ``repeats`` runs by a clock read when the device is idle."""
    for _ in range(warm_ups):
        work()
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, synchronize: Callable[[], None]) -> float:
    """Returns bytes read and written a second by a large copy."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), synchronize, repeats=9)


def matmul_rate(device: torch.device, synchronize: Callable[[], None], for_seconds: float = 5.0) -> float:
    """Returns FLOP a second of bf16 matrix products kept up for a while: cards slow down as they warm up."""
    side = MATMUL_SIDE if device.type != "cpu" else MATMUL_SIDE // 16
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(left)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < for_seconds:
        for _ in range(20):
            torch.matmul(left, right, out=product)
        synchronize()
        count += 20
    return count * 2 * side**3 / (time.perf_counter() - started)


def say_kernels(work: Callable[[], object], synchronize: Callable[[], None], most: int = 14, **named: Any) -> None:
    """Prints the kernels of some work on this process's GPU, those that take longest first."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415 - only where it is asked for

    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        synchronize()
    for event in sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)[:most]:
        say("kernel", **named, name=event.key[:70], ms=event.self_device_time_total / 1e3, calls=event.count)

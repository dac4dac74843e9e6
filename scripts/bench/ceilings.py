#!/usr/bin/env python3
"""Measures the copy bandwidth and the matrix product rate of a device. Prints JSON lines.

    scripts/bench/ceilings.py [--device cuda:0]

Benchmarks of a server run this before they start it, in a process of its own, so that they hold no device themselves.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import new_parser, parse


def main(arguments: Sequence[str] | None = None) -> int:
    from timing import open_benchmark_device, report_ceilings  # noqa: PLC0415 - imports torch

    parser = new_parser("ceilings.py", __doc__)
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    flags = parse(parser, arguments, {})
    report_ceilings(open_benchmark_device(flags.device), brief=flags.brief)
    return 0


def report_ceilings_of(device: str, *, brief: bool) -> None:
    """Reports the ceilings of a device, measured by a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--device", device, *["--brief"] * brief]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(ended.stdout, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())

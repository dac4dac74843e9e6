"""Chaos for a few failures and for ten minutes, in its own process, which counts its open resources."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"
LONG_SECONDS = 600
SHORT_FAILURES, SHORT_CALM_SECONDS, SHORT_SECONDS = 1, 1.5, 600
"""Failures of each signal in the short run, and the time in which a slow machine has them."""

OVERHEAD_SECONDS = 300
"""Limit for the server's start, the reference images and the last restart."""


def chaos(checkpoint: Path, seconds: int, **flags: float) -> dict[str, Any]:
    values = {"checkpoint": checkpoint, "seconds": seconds, **flags}
    command = [sys.executable, str(PROGRAM), *(f"--{name}={value}" for name, value in values.items())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + OVERHEAD_SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    counts: dict[str, Any] = json.loads(ended.stdout)
    assert counts["faults"] == 0
    assert {failure.split()[0] for failure in counts["failures"]} == {"SIGKILL", "SIGSTOP"}
    assert counts["outcomes"]["good"]["image"] > 0
    assert counts["outcomes"]["good"]["closed"] + counts["outcomes"]["good"].get("failed", 0) > 0
    return counts


def test_every_request_ends_over_a_failure_of_each_signal(tiny_checkpoint: Path, same_threads: None) -> None:
    counts = chaos(tiny_checkpoint, SHORT_SECONDS, seed=1, clients=3, failures=SHORT_FAILURES, calm=SHORT_CALM_SECONDS)
    signals = Counter[str]()
    for failure, count in counts["failures"].items():
        signals[failure.split()[0]] += count
    assert signals == {"SIGKILL": SHORT_FAILURES, "SIGSTOP": SHORT_FAILURES}


@pytest.mark.full
def test_every_request_ends_over_ten_minutes(tiny_checkpoint: Path, same_threads: None) -> None:
    counts = chaos(tiny_checkpoint, LONG_SECONDS, seed=2, clients=4)
    assert all(counts["outcomes"].values())

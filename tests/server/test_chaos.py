"""Chaos, a minute of it and ten: a process of its own, which counts what it holds on to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"
SHORT_SECONDS, LONG_SECONDS = 60, 600
BESIDE_SECONDS = 300
"""What its server's start, the pictures in peace and the last restart may take."""


def chaos(checkpoint: Path, seconds: int, seed: int, clients: int) -> dict[str, Any]:
    flags = {"checkpoint": checkpoint, "seconds": seconds, "seed": seed, "clients": clients}
    command = [sys.executable, str(PROGRAM), *(f"--{name}={value}" for name, value in flags.items())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + BESIDE_SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    counts: dict[str, Any] = json.loads(ended.stdout)
    assert counts["faults"] == 0
    assert {blow.split()[0] for blow in counts["blows"]} == {"SIGKILL", "SIGSTOP"}
    assert counts["endings"]["good"]["picture"] > 0
    assert counts["endings"]["good"]["closed"] + counts["endings"]["good"].get("failed", 0) > 0
    return counts


def test_a_broken_server_answers_everybody(tiny_checkpoint: Path, same_threads: None) -> None:
    chaos(tiny_checkpoint, SHORT_SECONDS, seed=1, clients=3)


@pytest.mark.full
def test_a_server_that_is_broken_for_long(tiny_checkpoint: Path, same_threads: None) -> None:
    counts = chaos(tiny_checkpoint, LONG_SECONDS, seed=2, clients=4)
    assert all(counts["endings"].values())

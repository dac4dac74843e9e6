"""Ten minutes on a host that is at fault in every way, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SECONDS, IMAGES = 600, 500
LIMIT_SECONDS = 3600
"""A slow machine takes longer for the images."""


@pytest.mark.full
def test_images_and_resources_on_a_faulty_host(tiny_checkpoint: Path) -> None:
    command = [sys.executable, SCRIPTS / "host_soak.py", "--checkpoint", tiny_checkpoint]
    ended = subprocess.run(
        [*command, "--seconds", str(SECONDS), "--images", str(IMAGES)],
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    results = json.loads(ended.stdout)
    assert results["images"]["equal"] >= IMAGES
    assert results["faults"] == 0

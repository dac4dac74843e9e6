"""What a server leaves when it is killed: its shared memory and its run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def remove_leftovers(shm_prefix: str, run_directory: Path) -> None:
    """Removes a server's shared memory and its run directory."""
    for region in SHARED_MEMORY.glob(f"{shm_prefix}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(run_directory, ignore_errors=True)

"""The Python that child processes of a stage run."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def python_program() -> str:
    """Returns the path of the running Python's program."""
    # A Triton stub embeds Python, and its sys.executable may be the stub itself.
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return str(Path(sys.prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def child_environment() -> dict[str, str]:
    """Returns the environment of a child that imports what this process imports."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}

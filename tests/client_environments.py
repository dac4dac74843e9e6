"""Environments of other programs, which ``scripts/gateway_clients`` makes; a test skips where one is absent."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from server.documents import REPOSITORY_ROOT

FOLDER = Path(os.environ.get("GLM_IMAGE_CLIENTS") or REPOSITORY_ROOT / ".clients")


def environment(name: str, *programs: str) -> Path:
    """Returns the folder of an environment; ``programs`` are needed in PATH as well."""
    folder = FOLDER / name
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"this machine has no {' and no '.join(missing)}")
    if not folder.exists():
        pytest.skip(f"{folder} is absent: ./scripts/gateway_clients {name}")
    return folder


def add_packages(name: str) -> None:
    """Makes the packages of an environment importable, after the project's own, which it must not replace."""
    packages = [str(path) for path in environment(name).glob("lib/python*/site-packages")]
    sys.path.extend(path for path in packages if path not in sys.path)

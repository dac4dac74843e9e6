"""The private folder of a running server, which ``serve`` makes and in which its processes find each other."""

from __future__ import annotations

import os
from pathlib import Path

RUN_DIRECTORY_VARIABLE = "GLM_IMAGE_RUN_DIRECTORY"
"""The environment variable that passes the folder to the models."""


def run_directory() -> Path | None:
    """Returns the folder; None where the server was started without one."""
    path = os.environ.get(RUN_DIRECTORY_VARIABLE)
    return Path(path) if path else None

"""The private folder of a running server, which ``serve`` makes: where its processes find each other."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "GLM_IMAGE_RUN_DIRECTORY"
"""Names the folder to the models."""


def run_directory() -> Path | None:
    """Returns the folder; None where the server was started without one."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None

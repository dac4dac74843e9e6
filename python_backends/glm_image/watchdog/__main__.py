"""The watchdog's program, run as a file: ``python -I -S .../glm_image/watchdog/__main__.py FLAGS -- COMMAND``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Runs the command after ``--``; returns its exit code."""
    from glm_image.watchdog.leftovers import remove_leftovers  # noqa: PLC0415 - found through the path set below
    from glm_image.watchdog.watchdog import Watchdog  # noqa: PLC0415

    parser = argparse.ArgumentParser()
    parser.add_argument("--shm-prefix", required=True)
    parser.add_argument("--run-directory", required=True, type=Path)
    parser.add_argument("--drain-seconds", required=True, type=float)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    try:
        return Watchdog(arguments.command, arguments.run_directory, arguments.drain_seconds).run()
    finally:
        remove_leftovers(arguments.shm_prefix, arguments.run_directory)


if __name__ == "__main__":
    # Isolated from the environment and from installed packages, so that nothing there can break it.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())

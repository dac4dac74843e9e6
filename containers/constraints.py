"""Writes the constraints of a container: the project's, except for packages that the base image contains.

    constraints.py constraints.txt > /tmp/constraints.txt

A vendor's torch is built for its libraries and must be kept: an installed package of ``VENDOR`` is pinned to its
installed version.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

VENDOR = ("numpy", "torch", "torch-npu", "triton")


def container_constraints(text: str, installed: dict[str, str]) -> str:
    """Returns the lines of ``text``, with installed packages pinned to their installed versions."""
    lines = []
    for line in text.splitlines():
        name = normalized(line.partition("==")[0])
        lines.append(f"{name}=={installed[name]}" if name in installed else line)
    return "\n".join(lines) + "\n"


def installed_by_the_vendor() -> dict[str, str]:
    """Returns the installed packages of ``VENDOR`` with their versions."""
    versions = {}
    for name in VENDOR:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def normalized(name: str) -> str:
    """Returns a package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    sys.stdout.write(container_constraints(Path(sys.argv[1]).read_text(), installed_by_the_vendor()))

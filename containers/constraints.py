"""Writes the constraints of a container: those of the project, but for what the base image brings of its own.

    constraints.py constraints.txt > /tmp/constraints.txt

A vendor's torch is built for its libraries and must stay: a package of ``VENDOR`` that is installed already is pinned
to the version that is there.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

VENDOR = ("numpy", "torch", "torch-npu", "triton")


def container_constraints(text: str, installed: dict[str, str]) -> str:
    """Returns the lines of ``text``, those of ``installed`` packages with the version that is there."""
    lines = []
    for line in text.splitlines():
        name = normalized(line.partition("==")[0])
        lines.append(f"{name}=={installed[name]}" if name in installed else line)
    return "\n".join(lines) + "\n"


def installed_by_the_vendor() -> dict[str, str]:
    """The packages of ``VENDOR`` that are there, each with its version."""
    found = {}
    for name in VENDOR:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def normalized(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    sys.stdout.write(container_constraints(Path(sys.argv[1]).read_text(), installed_by_the_vendor()))

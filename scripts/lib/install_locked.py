"""Installs this project and, with checked hashes, the packages of requirements/*.txt for the running Python.

    install_locked.py [--keep NAME,...] [--quiet] EXTRA...

A package of ``--keep`` that is installed already keeps its version: a vendor's torch is built for its libraries.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENTS = REPOSITORY / "requirements"
OF_CUDA = re.compile(r"(nvidia|cuda)-")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="install_locked")
    parser.add_argument("extras", nargs="+", metavar="EXTRA", help="an extra of pyproject.toml")
    parser.add_argument("--keep", default="", metavar="NAME,...", help="packages to leave alone if they are installed")
    parser.add_argument("--quiet", action="store_true")
    flags = parser.parse_args(arguments)
    quiet = ["--quiet"] * flags.quiet
    kept = {name for name in map(normalized, filter(None, flags.keep.split(","))) if installed(name)}
    try:
        kept |= install_cpu_builds(flags.extras, kept, quiet)
        install_hashed(["build", *flags.extras], kept, quiet)
        if torch_needs_cuda():
            install_hashed(["cuda"], kept, quiet)
        # All that the project needs is there. A folder has no hash, and pip would not check the build requirements.
        pip("install", *quiet, "--no-deps", "--no-build-isolation", "--editable", str(REPOSITORY))
        # The packages of a vendor's image need not suit each other.
        pip("check", check=not flags.keep)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def install_hashed(names: Sequence[str], kept: Collection[str], quiet: Sequence[str]) -> None:
    """Installs the files of requirements/ with these names, without the packages of ``kept``."""
    blocks = [block for name in names for block in blocks_of(name)]
    install_blocks([block for block in blocks if name_of(block) not in kept], quiet)


def install_cpu_builds(extras: Sequence[str], kept: Collection[str], quiet: Sequence[str]) -> set[str]:
    """Installs those CPU builds that the extras need and pip finds; returns their names.

    Given the hashes of two builds of a version, pip would take that of the index, which needs CUDA's libraries.
    """
    needed = {name_of(block) for extra in extras for block in blocks_of(extra)}
    builds = [block for block in blocks_of("cpu") if name_of(block) in needed - set(kept)]
    for block in builds:
        # Elsewhere the build is not found, which is no fault.
        install_blocks([block], [*quiet, "--quiet", "--quiet", "--quiet"], check=False)
    importlib.invalidate_caches()
    return {name_of(block) for block in builds if block.startswith(f"{name_of(block)}=={installed(name_of(block))} ")}


def install_blocks(blocks: Sequence[str], quiet: Sequence[str], *, check: bool = True) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(blocks) + "\n")
        file.flush()
        options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirement", file.name]
        pip("install", *quiet, *options, check=check)


def blocks_of(name: str) -> list[str]:
    """Returns the packages of a file of requirements/, each with its hashes on one line."""
    path = REQUIREMENTS / f"{name}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: scripts/lock writes it")
    joined = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith(("#", "-"))]


def name_of(block: str) -> str:
    return normalized(block.partition("==")[0])


def torch_needs_cuda() -> bool:
    """Whether the installed torch is a build that needs CUDA's libraries from the package index."""
    importlib.invalidate_caches()
    try:
        needed = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(OF_CUDA.match(line) and "extra ==" not in line for line in needed)


def installed(name: str) -> str | None:
    """Returns the installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def normalized(name: str) -> str:
    """Returns a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def pip(*arguments: str, check: bool = True) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=check)


if __name__ == "__main__":
    sys.exit(main())

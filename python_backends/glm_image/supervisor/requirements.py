"""The requirements of the nvidia-pytriton wheel's Triton, checked before anything is installed."""

from __future__ import annotations

import ctypes.util
import os
import platform
import re
import sys
import sysconfig
from pathlib import Path

from glm_image.errors import ConfigurationError, printable

CONTAINER_SERVER = Path("/opt/tritonserver")
OLDEST_GLIBC = (2, 35)
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_CONTAINER_ADVICE = f"run in a Triton container, whose server lies in {CONTAINER_SERVER}"


def has_container_server() -> bool:
    """Whether this machine is a Triton container."""
    return (CONTAINER_SERVER / "bin" / "tritonserver").is_file()


def check_bundled_server(machine: str | None = None, libc: str | None = None) -> None:
    """Checks that the Triton of the nvidia-pytriton wheel runs here, or on a ``machine`` with ``libc`` (glibc 2.36).

    Raises:
        ConfigurationError: names the missing requirement and a remedy.
    """
    machine = machine or platform.machine()
    if machine != "x86_64":
        raise ConfigurationError(
            f"the Triton of the nvidia-pytriton package runs on x86_64, this machine is {machine}: {_CONTAINER_ADVICE}"
        )
    libc = _libc() if libc is None else libc
    version = re.fullmatch(r"glibc (\d+)\.(\d+).*", libc)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_GLIBC:
        needed = ".".join(map(str, OLDEST_GLIBC))
        raise ConfigurationError(
            f"the Triton of the nvidia-pytriton package needs glibc {needed} or newer, and this machine has {libc}: "
            f"use a newer system (Debian 12, Ubuntu 22.04) or {_CONTAINER_ADVICE}"
        )
    libpython_directory()


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "an unknown C library"
    except (ValueError, OSError):
        return "another C library"


def libpython_directory(candidates: list[Path] | None = None) -> Path | None:
    """Returns the folder of the running Python's shared library, which Triton's Python stub links.

    Searches ``candidates``, by default the folders of this Python's build. None: the dynamic linker finds the library.

    Raises:
        ConfigurationError: the library is not found.
    """
    name = f"libpython{PYTHON_VERSION}.so.1.0"
    # The running Python's folders come first, as the linker may know another build of the same version.
    for folder in _libpython_candidates() if candidates is None else candidates:
        if (folder / name).exists():
            return folder
    if candidates is None and ctypes.util.find_library(f"python{PYTHON_VERSION}") == name:
        return None
    raise ConfigurationError(
        f"{name}, the shared library of {sys.executable}, is missing and Triton's Python backend links it: "
        f"install libpython{PYTHON_VERSION} (Debian, Ubuntu) or use a Python built with --enable-shared"
    )


def _libpython_candidates() -> list[Path]:
    library, multiarch = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("MULTIARCH")
    folders = [Path(sys.base_prefix) / "lib", Path(sys.base_prefix) / "lib64"]
    if library:
        folders = [Path(library), *folders, *([Path(library) / multiarch] if multiarch else [])]
    return folders


def main() -> int:
    """Prints what this machine lacks for a server; returns the exit code."""
    try:
        if not has_container_server():
            check_bundled_server()
    except ConfigurationError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0

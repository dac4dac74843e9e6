"""Finds a Triton and builds a private backend folder, in which model processes import this package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from glm_image.errors import ConfigurationError
from glm_image.supervisor.python_environment import Plain, program_folder
from glm_image.supervisor.requirements import (
    CONTAINER_SERVER,
    PYTHON_VERSION,
    check_bundled_server,
    has_container_server,
    libpython_directory,
)

_PACKAGE = Path(__file__).resolve().parents[1]
_STUB = "triton_python_backend_stub"
_INPUT_LIMIT_FLAG = "--http-max-input-size"


@dataclass(frozen=True)
class Installation:
    """A Triton: its folder, the stub for this Python, and folders for the dynamic linker."""

    folder: Path
    stub: Path
    library_folders: tuple[Path, ...]

    @property
    def binary(self) -> Path:
        return self.folder / "bin" / "tritonserver"

    @property
    def caches(self) -> Path:
        return self.folder / "caches"

    @property
    def is_bundled(self) -> bool:
        """Whether it is the one in the nvidia-pytriton package, which is for development only."""
        return self.folder != CONTAINER_SERVER

    def input_limit_flags(self, max_bytes: int) -> list[str]:
        """Returns the flags that limit the body of an HTTP request; none if this Triton has no such limit."""
        with self.binary.open("rb") as binary, mmap.mmap(binary.fileno(), 0, access=mmap.ACCESS_READ) as program:
            known = program.find(_INPUT_LIMIT_FLAG.lstrip("-").encode()) >= 0
        return [f"{_INPUT_LIMIT_FLAG}={max_bytes}"] if known else []

    def lay_out_backends(self, run_directory: Path) -> Path:
        """Returns a folder for ``--backend-directory``: links, in ``run_directory``, to the installation's backends.

        Its ``python``, which the Python backend puts on every model's import path, also has a link to this package.
        """
        backends = run_directory / "backends"
        (backends / "python").mkdir(parents=True)
        for backend in (self.folder / "backends").iterdir():
            if backend.name != "python":
                (backends / backend.name).symlink_to(backend)
        for part in (self.folder / "backends" / "python").iterdir():
            if part.name not in {_STUB, "__pycache__"}:
                (backends / "python" / part.name).symlink_to(part)
        (backends / "python" / _STUB).symlink_to(self.stub)
        (backends / "python" / _PACKAGE.name).symlink_to(_PACKAGE)
        return backends

    def environment(self, run_directory: Path, plain: Plain) -> dict[str, str]:
        """Returns this process's environment, with its Python first on PATH: the stub takes its packages from it."""
        libraries = [plain(folder, f"libraries{index}") for index, folder in enumerate(self.library_folders)]
        programs = program_folder(run_directory / "python", plain)
        return {
            **os.environ,
            "PATH": _joined([str(programs)], os.environ.get("PATH")),
            "LD_LIBRARY_PATH": _joined(libraries, os.environ.get("LD_LIBRARY_PATH")),
        }


def find_installation() -> Installation:
    """Finds the Triton of a container, else the one in the nvidia-pytriton package.

    Raises:
        ConfigurationError: there is none, or it does not run on this machine or with this Python.
    """
    return _container_server() if has_container_server() else _bundled_server()


def _container_server() -> Installation:
    stub = CONTAINER_SERVER / "backends" / "python" / _STUB
    if not stub.is_file():
        raise ConfigurationError(f"{stub} is missing: use a Triton container with the Python backend")
    linked = re.search(rb"libpython(\d+\.\d+)\.so", stub.read_bytes())
    needed = linked[1].decode() if linked else PYTHON_VERSION
    if needed != PYTHON_VERSION:
        raise ConfigurationError(
            f"this container's Python backend is for Python {needed}, and this is Python {PYTHON_VERSION}: "
            f"start it with python{needed}"
        )
    return Installation(CONTAINER_SERVER, stub, (CONTAINER_SERVER / "lib",))


def _bundled_server() -> Installation:
    check_bundled_server()
    package = importlib.util.find_spec("pytriton")
    if package is None or not package.submodule_search_locations:
        raise ConfigurationError(
            f"no Triton: there is no {CONTAINER_SERVER}, and the package nvidia-pytriton is not installed; "
            "install this project with its extra 'triton', or run in a Triton container"
        )
    folder = Path(package.submodule_search_locations[0]) / "tritonserver"
    stubs = folder / "python_backend_stubs"
    stub = stubs / PYTHON_VERSION / _STUB
    if not stub.is_file():
        known = ", ".join(sorted((path.name for path in stubs.iterdir()), key=lambda name: int(name.split(".")[1])))
        raise ConfigurationError(
            f"this is Python {PYTHON_VERSION}, and nvidia-pytriton serves Python {known}: use one of these"
        )
    _check_numpy()
    libpython = libpython_directory()
    libraries = [folder.parents[1] / "nvidia_pytriton.libs", *([libpython] if libpython else [])]
    return Installation(folder, stub, tuple(libraries))


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:  # noqa: PLR2004
        raise ConfigurationError(
            f"numpy is {version}, and the Python backend of nvidia-pytriton needs a numpy below 2: install 'numpy<2', "
            "or run in a Triton container"
        )


def _joined(first: list[str], rest: str | None) -> str:
    return os.pathsep.join([*first, *([rest] if rest else [])])

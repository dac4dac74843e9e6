"""The published torch_npu in a folder of its own, and the variables with which a process runs on the stand-in.

torch_npu cannot be part of the usual environment: ``import torch`` imports every installed backend, and this one fails
without CANN's libraries.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

# A folder that is imported from by path, by tests and by scripts/npu_standin.
sys.path.insert(0, str(Path(__file__).parent))
from build import build

ROOT = Path(__file__).resolve().parents[3]
DOWNLOAD_SECONDS = 240


class NotAvailableError(RuntimeError):
    """torch_npu cannot be installed on this machine."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm-image-triton"


def pinned(project: str) -> str:
    """Returns the version of a package in ``constraints.txt``."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{project}==([\w.]+)$", constraints, re.MULTILINE)
    return str(version)


def torch_npu_wheel() -> Path:
    """Returns the pinned torch-npu for this Python, from the user's cache; downloaded once.

    Raises:
        NotAvailableError: it cannot be downloaded.
    """
    version, python = pinned("torch-npu"), f"cp{sys.version_info.major}{sys.version_info.minor}"
    cache = cache_folder() / "torch-npu"
    pattern = f"torch_npu-{version}-{python}-*_{platform.machine()}.whl"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (found := sorted(cache.glob(pattern))):
            with tempfile.TemporaryDirectory(dir=cache) as unfinished:
                _pip("download", f"torch-npu=={version}", "--only-binary=:all:", "--dest", unfinished)
                for file in Path(unfinished).glob("*.whl"):
                    file.rename(cache / file.name)
            found = sorted(cache.glob(pattern))
    if not found:
        raise NotAvailableError(f"torch-npu {version} has no wheel for {python} on {platform.machine()}")
    return found[0]


def torch_npu_site() -> Path:
    """Returns a folder with the pinned torch-npu, for ``PYTHONPATH``; made once."""
    wheel = torch_npu_wheel()
    site = wheel.with_suffix("")
    with (wheel.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not site.exists():
            with tempfile.TemporaryDirectory(dir=wheel.parent) as unfinished:
                _pip("install", str(wheel), "--target", f"{unfinished}/site")
                Path(unfinished, "site").rename(site)
    return site


def virtual_environment(site: Path) -> Path:
    """Returns a virtual environment that has this Python's packages and torch_npu's; made once.

    Triton's Python backend runs in isolated mode, which ignores ``PYTHONPATH``.
    """
    own = [path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")]
    name = hashlib.sha256(f"{sys.executable} {own} {site}".encode()).hexdigest()[:16]
    made = cache_folder() / "npu-standin" / f"environment-{name}"
    made.parent.mkdir(parents=True, exist_ok=True)
    with (made.parent / "lock-environment").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "complete").exists():
            venv.create(made, clear=True, symlinks=True)
            (packages,) = made.glob("lib/python*/site-packages")
            lines = [f"import site; site.addsitedir({str(path)!r})" for path in own]
            (packages / "packages.pth").write_text("\n".join([*lines, str(site), ""]), encoding="utf-8")
            (made / "complete").touch()
    return made


def _pip(command: str, *arguments: str) -> None:
    options = ["--no-deps", "--quiet", "--retries", "1", "--timeout", "15", "--disable-pip-version-check"]
    try:
        subprocess.run(
            [sys.executable, "-m", "pip", command, *arguments, *options],
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        raise NotAvailableError(f"pip cannot {command} {arguments[0]}: {error.stderr.strip()[-300:]}") from None
    except subprocess.TimeoutExpired:
        raise NotAvailableError(f"pip cannot {command} {arguments[0]} within {DOWNLOAD_SECONDS} s") from None


def standin_environment(devices: int = 1, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the variables of a process that sees ``devices`` NPUs; compiles the stand-in at first use.

    Raises:
        NoCompilerError: this machine has no g++.
        NotAvailableError: torch_npu cannot be installed.
    """
    site = torch_npu_site()
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise NotAvailableError("torch is not installed")
    libraries = build(cache_folder() / "npu-standin", Path(found.origin).parent, site / "torch_npu")
    nodes = cache_folder() / "npu-standin" / f"nodes-{devices}"
    nodes.mkdir(exist_ok=True)
    for device in range(devices):
        (nodes / f"davinci{device}").touch()

    def prepended(variable: str, path: Path) -> str:
        return os.pathsep.join(filter(None, [str(path), environment.get(variable)]))

    variables = {name: value for name, value in environment.items() if not name.startswith("ASCEND_HOME")}
    own = virtual_environment(site)
    return variables | {
        "VIRTUAL_ENV": str(own),
        "PATH": prepended("PATH", own / "bin"),
        "LD_LIBRARY_PATH": prepended("LD_LIBRARY_PATH", libraries),
        "PYTHONPATH": prepended("PYTHONPATH", site),
        "CANN_STANDIN_DEVICES": str(devices),
        # Discovery counts the drivers' device nodes, which only root can make.
        "GLM_IMAGE_DEVICE_NODES": str(nodes),
    }


def main() -> None:
    command = sys.argv[1:]
    command = command[command[:1] == ["--"] :]
    if not command:
        sys.exit("usage: npu_standin [--] COMMAND...")
    try:
        variables = standin_environment(int(os.environ.get("CANN_STANDIN_DEVICES") or 1))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    os.execvpe(command[0], command, variables)


if __name__ == "__main__":
    main()

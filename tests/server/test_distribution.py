"""The wheel and the sdist, built from the checkout's files and installed into an environment of their own.

Their dependencies are those of this environment, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib

from server.served import END_TIMEOUT_SECONDS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]["find"]["where"]
SOURCES = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"),
    *(*PACKAGES, "model_repository"),
)
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")
SMALL = ["--size", "64x32", "--steps", "2", "--seed", "3"]


class Distribution(NamedTuple):
    """The files, and the environment into which the wheel is installed."""

    wheel: Path
    sdist: Path
    environment: Path

    @property
    def command(self) -> str:
        return str(self.environment / "bin" / "glm-image")


def build(kind: str, project: Path, target: Path) -> Path:
    subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(target)], cwd=project, check=True, stdout=subprocess.DEVNULL
    )
    (file,) = target.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[kind])
    return file


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """The wheel is built from the sdist, so that both are complete."""
    folder = tmp_path_factory.mktemp("distribution")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name, **({"ignore": IGNORED} if copy is shutil.copytree else {}))
    sdist = build("sdist", checkout, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("wheel", unpacked, folder / "wheel")
    return Distribution(wheel, sdist, installed(wheel, folder / "environment"))


def installed(wheel: Path, environment: Path) -> Path:
    venv.create(environment, with_pip=False, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # As paths alone: what their own .pth files add, such as this checkout, stays out.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--no-compile", str(wheel)], check=True, env=clean())
    return environment


def clean() -> dict[str, str]:
    """The environment variables without what leads back to the checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "GLM_IMAGE_MODEL_REPOSITORY", "GLM_IMAGE_URL")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def test_the_wheel_has_every_module_and_every_model(distribution: Distribution) -> None:
    expected = set()
    for folder, prefix in (
        ("python_backends", ""),
        ("client", ""),
        ("gateway", ""),
        ("model_repository", "glm_image/model_repository/"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path):
                expected.add(prefix + str(path.relative_to(ROOT / folder)))
    contents = {name for name in zipfile.ZipFile(distribution.wheel).namelist() if ".dist-info/" not in name}
    assert contents == expected


def test_the_installed_command_runs_from_any_folder(distribution: Distribution, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*arguments], cwd=tmp_path, env=clean(), capture_output=True, text=True, check=False)

    code = (
        "import json, glm_image, glm_image_client; from glm_image.supervisor.settings import default_model_repository;"
        "print(json.dumps([glm_image.__file__, glm_image_client.__file__, str(default_model_repository())]))"
    )
    found = json.loads(run(str(distribution.environment / "bin" / "python"), "-c", code).stdout)
    assert all(Path(path).is_relative_to(distribution.environment) for path in found)
    assert run(distribution.command, "--version").stdout.startswith("glm-image ")
    (tmp_path / "model_index.json").write_text("{}")
    refused = run(distribution.command, "serve", "--checkpoint", str(tmp_path), "--profile", "none-such")
    assert refused.returncode == 2
    assert "--profile is none-such; allowed: cpu, cuda-1x80g" in refused.stderr


@pytest.fixture
def ready(
    distribution: Distribution, tiny_checkpoint: Path, tmp_path: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    ports = [flag for kind in ("http", "grpc", "metrics") for flag in (f"--{kind}-port", "0")]
    command = [distribution.command, "serve", "--checkpoint", str(tiny_checkpoint), *ports]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=clean(), stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("ready: "), (tmp_path / "log").read_text()
        yield line.split("grpc://")[1].strip(), server
    finally:
        server.kill()
        server.communicate()


@pytest.mark.full
def test_the_installed_command_serves_a_checkpoint(
    distribution: Distribution, ready: tuple[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    url, server = ready
    command = [distribution.command, "generate", "A fox", *SMALL, "-o", "fox.png", "--url", url]
    subprocess.run(command, cwd=tmp_path, env=clean(), check=True)
    assert (tmp_path / "fox.png").is_file()
    server.send_signal(signal.SIGTERM)
    assert server.wait(END_TIMEOUT_SECONDS) == 0

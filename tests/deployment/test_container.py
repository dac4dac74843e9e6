"""The target cpu of the Dockerfile: built without a registry, run by podman with as few rights as in a cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployment.manifests import ROOT
from glm_image.watchdog.watchdog import STOP_GRACE_SECONDS

TOOLS = ("buildah", "debootstrap", "podman", "runc")
BUILD_SECONDS = 3600
START_SECONDS = 900
SECONDS = 600
DRAIN_SECONDS = 600
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PASSED_ON = ("index-url", "find-links", "cert", "default-timeout")
"""Settings of pip."""

TOKENS = """
import urllib.request
lines = urllib.request.urlopen("http://127.0.0.1:8002/metrics").read().decode().splitlines()
print(*(line.split()[-1] for line in lines if line.startswith("glm_image_ar_tokens_total{")))
"""
"""Prints the image tokens that have been sampled."""

pytestmark = pytest.mark.full


def run(*command: str | Path, seconds: float = SECONDS, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done


def wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image of the target cpu, on a base that is made here."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, {', '.join(TOOLS)}; missing: {', '.join(missing) or 'root'}")
    overlay = tmp_path_factory.mktemp("overlay")
    write_pip_settings(overlay)
    base, image = (f"localhost/glm-image-test-{name}:{uuid.uuid4().hex[:8]}" for name in ("base", "cpu"))
    try:
        run(ROOT / "containers" / "make_base", base, overlay, seconds=BUILD_SECONDS)
        options = ["--isolation", "chroot", "--pull-never", "--format", "docker", "--target", "cpu", "--tag", image]
        options += ["--build-arg", "SYSTEM=python", "--build-arg", f"PYTHON_IMAGE={base}"]
        run("buildah", "build", *options, ROOT, seconds=BUILD_SECONDS)
        yield image
    finally:
        run("buildah", "rmi", "--force", image, base, check=False)


def write_pip_settings(overlay: Path) -> None:
    """Gives the base image the index, wheels and certificates that pip uses here."""
    listed = run(sys.executable, "-m", "pip", "config", "list").stdout
    settings = dict(line.split("=", 1) for line in listed.splitlines())
    given = {name: settings.get(f":env:.{name}", settings.get(f"global.{name}", "")).strip("'") for name in PASSED_ON}
    lines = ["[global]", *(f"{name} = {value}" for name, value in given.items() if value)]
    (overlay / "etc" / "ssl" / "certs").mkdir(parents=True)
    (overlay / "etc" / "pip.conf").write_text("\n".join(lines) + "\n")
    shutil.copy(CERTIFICATES, overlay / CERTIFICATES.relative_to("/"))
    for folder in map(Path, given["find-links"].split()):
        if folder.is_dir():
            shutil.copytree(folder, overlay / folder.relative_to("/"))


class Container:
    """A running container without a network: requests are sent from within."""

    def __init__(self, image: str) -> None:
        self.name = f"glm-image-test-{uuid.uuid4().hex[:8]}"
        options = ["--detach", "--name", self.name, "--runtime", "runc", "--network", "none", "--read-only"]
        options += ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096", "--shm-size", "1g"]
        options += ["--tmpfs", "/tmp:rw,exec,mode=1777", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
        options += ["--volume", f"{ROOT / 'checkpoints' / 'tiny'}:/checkpoint:ro"]
        run("podman", "run", *options, image, "--profile", "cpu", "--drain-seconds", str(DRAIN_SECONDS))

    @property
    def log(self) -> str:
        done = run("podman", "logs", self.name)
        return done.stdout + done.stderr

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads(run("podman", "inspect", self.name).stdout)[0]["State"])

    def ready(self) -> bool:
        assert self.state["Running"], self.log
        return "ready: http://0.0.0.0:8000 grpc://0.0.0.0:8001" in self.log.splitlines()

    def execute(self, *command: str, check: bool = True) -> str:
        return run("podman", "exec", self.name, *command, check=check).stdout.strip()

    def python(self, code: str) -> str:
        return self.execute("python3", "-c", code)

    def remove(self) -> None:
        run("podman", "rm", "--force", "--time", "0", self.name, check=False)


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[Container]:
    container = Container(image)
    try:
        wait(container.ready, START_SECONDS)
        yield container
    finally:
        container.remove()


def test_it_has_no_rights(container: Container) -> None:
    assert (
        container.execute(
            "id",
            "-u",
        )
        == "10001"
    )
    status = container.execute("cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4
    assert {fields[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    for path in ("/opt/glm-image/new", "/checkpoint/new", "/new"):
        code = f"try:\n open({path!r}, 'w')\nexcept OSError as error:\n print(error.strerror)"
        assert container.python(code) == "Read-only file system"


def test_the_health_check_is_green(container: Container) -> None:
    run("podman", "healthcheck", "run", container.name)


def test_it_generates_an_image(container: Container) -> None:
    options = ["--size", "256x256", "--steps", "20", "--seed", "42", "-o", "/tmp/out.png"]
    container.execute("glm-image", "generate", "A red fox with a sign that says 'NEWS'", *options)
    code = "import numpy, PIL.Image; a = numpy.asarray(PIL.Image.open('/tmp/out.png')); print(a.shape, a.std() > 20)"
    assert container.python(code) == "(256, 256, 3) True"


def test_it_has_a_gateway_and_the_download(container: Container) -> None:
    assert "--ar URL" in container.execute("python3", "-m", "glm_image_gateway", "--help")
    assert "--revision" in container.execute("/opt/glm-image/scripts/download", "--help")
    packages = json.loads(container.execute("cat", "/opt/glm-image/sbom.cdx.json"))["components"]
    assert {"nvidia-pytriton", "torch", "fastapi"} <= {package["name"] for package in packages}


def test_a_stop_lets_the_request_in_flight_finish(container: Container) -> None:
    """The last test of the module: it ends the container."""
    answered = container.log.count('"event": "request"')
    tokens = container.python(TOKENS)
    command = ["podman", "exec", container.name, "glm-image", "generate", "a fox", "--size", "256x256"]
    with subprocess.Popen([*command, "--steps", "20", "-o", "/tmp/last.png"], stdout=subprocess.DEVNULL) as client:
        try:
            wait(lambda: container.python(TOKENS) != tokens, SECONDS)
            run("podman", "stop", "--time", str(DRAIN_SECONDS + int(STOP_GRACE_SECONDS) + 10), container.name)
        finally:
            client.kill()
    assert container.state["ExitCode"] == 0, container.log
    lines = [json.loads(line) for line in container.log.splitlines() if '"event": "request"' in line]
    assert len(lines) == answered + 1
    assert lines[-1]["outcome"] == "ok"

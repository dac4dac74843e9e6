"""The container files, as far as they can be checked without building an image."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from glm_image.supervisor.cli import parse_arguments
from glm_image.watchdog.watchdog import STOP_GRACE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
TARGETS = ("cuda", "ascend", "cpu")
COMPOSED = ("cuda", "ascend")
ARCHITECTURES = ("x86_64", "aarch64")
RESOLVE_SECONDS = 600


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with its arguments on one line."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage -> what it is made from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            image, _, name = re.split(r"\s+", rest)
            found[name] = (image, [])
        elif name:
            found[name][1].append((word, rest))
    return found


def copied() -> list[str]:
    """What is copied out of the checkout."""
    sources = []
    for word, rest in instructions():
        if word == "COPY" and "--from=" not in rest:
            sources += rest.split()[:-1]
    return sources


def compose(target: str) -> dict[str, Any]:
    (service,) = yaml.safe_load((ROOT / f"compose.{target}.yaml").read_text())["services"].values()
    return dict(service)


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


def gigabytes(size: str) -> int:
    return int(re.findall(r"(\d+)gb?\b", size)[0])


class TestDockerfile:
    def test_copied_files_exist_and_are_not_ignored(self) -> None:
        kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        assert len(copied()) >= 8
        for source in copied():
            assert (ROOT / source).exists(), source
            assert source in kept
        assert set(kept) == set(copied())

    def test_no_weights_get_into_an_image(self) -> None:
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        assert "*" in ignored
        assert any(fnmatch.fnmatch("a/model.safetensors", pattern) for pattern in ignored if pattern.startswith("**"))
        assert not any("checkpoint" in source for source in copied())

    @pytest.mark.parametrize("target", TARGETS)
    def test_a_target_has_no_rights_a_health_check_and_serve(self, target: str) -> None:
        made_from, own = stages()[target]
        assert made_from == "base"
        assert own[-1] == ("USER", "10001:10001")
        shared = dict(stages()["base"][1])
        assert "/v2/health/ready" in shared["HEALTHCHECK"]
        program, *flags = json.loads(shared["ENTRYPOINT"])
        assert os.access(ROOT / Path(program).relative_to("/opt/glm-image"), os.X_OK)
        assert vars(parse_arguments(flags))["checkpoint"] == Path("/checkpoint")
        (health,) = re.findall(r"CMD (\[.*\])", shared["HEALTHCHECK"])
        compile(json.loads(health)[2], "health", "exec")

    def test_triton_is_new_enough(self) -> None:
        (year, month) = re.findall(r"ARG TRITON_IMAGE=\S+:(\d\d)\.(\d\d)-py3", DOCKERFILE)[0]
        assert (int(year), int(month)) >= (26, 7)

    def test_the_targets_share_every_step_but_the_system(self) -> None:
        own = {target: stages()[target][1] for target in TARGETS}
        assert own["cpu"] == own["cuda"]
        extra = [step for step in own["ascend"] if step not in own["cuda"]]
        assert [word for word, _ in extra] == ["COPY", "RUN"]
        assert extra[1][1] == f"{dict(own['cuda'])['RUN']} npu"

    def test_every_stage_that_is_named_is_there(self) -> None:
        assert set(TARGETS) < set(stages())
        (default,) = re.findall(r"^ARG SYSTEM=(\S+)$", DOCKERFILE, re.MULTILINE)
        assert stages()["base"][0] == "${SYSTEM}"
        assert {default, "python"} < set(stages())
        for stage in re.findall(r"--from=(\S+)", DOCKERFILE):
            assert stage in stages()

    def test_hadolint_finds_nothing(self, tmp_path: Path) -> None:
        program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if program is None:
            pytest.skip("this environment has no hadolint")
        (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && sudo apt-get install gcc\n")
        bad = subprocess.run([program, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
        assert "DL3004" in bad.stdout
        found = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (0, "")

    @pytest.mark.parametrize("name", ["serve", "install", "make_base"])
    def test_the_scripts_are_good_shell(self, name: str) -> None:
        subprocess.run(["bash", "-n", ROOT / "containers" / name], check=True)


@pytest.mark.parametrize("target", COMPOSED)
class TestCompose:
    def test_it_builds_its_target(self, target: str) -> None:
        build = compose(target)["build"]
        assert (build["context"], build["target"]) == (".", target)
        # The vendors' images can be named without an edit, and the defaults are the Dockerfile's.
        for name, value in build["args"].items():
            default = re.search(rf"^ARG {name}=(\S*)$", DOCKERFILE, re.MULTILINE)
            assert default is not None
            assert value == f"${{{name}:-{default[1]}}}"

    def test_it_is_reached_from_this_machine_alone(self, target: str) -> None:
        ports = compose(target)["ports"]
        assert [port.rsplit(":", 1)[1] for port in ports] == ["8000", "8001", "8002"]
        assert all(port.startswith("127.0.0.1:") for port in ports)

    def test_weights_are_mounted_to_read(self, target: str) -> None:
        (weights,) = [volume for volume in compose(target)["volumes"] if isinstance(volume, dict)]
        assert (weights["target"], weights["read_only"]) == ("/checkpoint", True)
        assert "GLM_IMAGE_CHECKPOINT:?" in weights["source"]

    def test_it_may_do_little(self, target: str) -> None:
        service = compose(target)
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "network_mode", "pid", "ipc"} & set(service)

    def test_memory_and_time_suffice(self, target: str) -> None:
        service = compose(target)
        assert service["shm_size"].endswith("gb")
        assert gigabytes(service["mem_limit"]) > 4 * gigabytes(service["shm_size"])
        assert service["memswap_limit"] == service["mem_limit"]
        assert service["ulimits"]["nofile"] >= 65536
        assert service["pids_limit"] >= 1024
        limits = {"max-size": "50m", "max-file": "10"}
        assert service["logging"]["options"] == {**limits, "mode": "non-blocking", "max-buffer-size": "4m"}
        drain = parse_arguments(["--checkpoint", "x"]).drain_seconds
        assert seconds(service["stop_grace_period"]) > drain + STOP_GRACE_SECONDS


def test_the_ascend_container_gets_its_card_and_the_driver() -> None:
    service = compose("ascend")
    assert service["devices"] == [
        "/dev/davinci${NPU_DEVICE:-0}",
        "/dev/davinci_manager",
        "/dev/devmm_svm",
        "/dev/hisi_hdc",
    ]
    mounts = [volume for volume in service["volumes"] if isinstance(volume, str)]
    driver = ("/usr/local/Ascend/driver", "/usr/local/dcmi", "/usr/local/bin/npu-smi")
    assert mounts == [f"{path}:{path}:ro" for path in driver]


def test_the_cuda_container_gets_its_card() -> None:
    (device,) = compose("cuda")["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


class TestImage:
    @pytest.mark.parametrize("target", TARGETS)
    def test_only_hashed_packages_are_installed(self, target: str) -> None:
        commands = [rest for word, rest in instructions() if word == "RUN"]
        assert not any("pip install" in command for command in commands)
        (command,) = [rest for word, rest in stages()[target][1] if word == "RUN"]
        assert command.endswith(" containers/install npu" if target == "ascend" else " containers/install")
        script = (ROOT / "containers" / "install").read_text()
        assert "pip install" not in script
        assert "install_locked.py --keep" in script
        assert "containers/write_sbom" in script

    def test_the_cache_of_pip_is_no_part_of_an_image(self) -> None:
        (home,) = re.findall(r"\bHOME=(\S+)", DOCKERFILE)
        assert set(re.findall(r"type=cache,target=(\S+)", DOCKERFILE)) == {f"{home}/.cache/pip"}

    def test_base_images_can_be_pinned_by_digest(self) -> None:
        for name in ("TRITON", "CANN", "PYTHON"):
            assert f"FROM ${{{name}_IMAGE}}${{{name}_DIGEST:+@${{{name}_DIGEST}}}} AS " in DOCKERFILE
            assert f"ARG {name}_DIGEST=\n" in DOCKERFILE

    @pytest.mark.parametrize("target", TARGETS)
    def test_labels(self, target: str) -> None:
        text = " ".join(
            rest
            for stage in ("triton", "python", "base", target)
            for word, rest in stages()[stage][1]
            if word == "LABEL"
        )
        labels = set(re.findall(r"org\.opencontainers\.image\.([\w.]+)=", text))
        assert labels >= {"title", "description", "licenses", "version", "revision", "created"}
        assert labels >= {"base.name", "base.digest"}
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        assert ("ARG", f"VERSION={version}") in stages()[target][1]

    def test_public_names_stand_in_the_documentation(self) -> None:
        text = (ROOT / "docs" / "containers.md").read_text()
        for default in re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE):
            assert re.search(rf"`{re.escape(default)}` \| `\w+/{re.escape(default)}`", text)


@pytest.mark.full
def test_the_bill_of_materials_lists_the_packages(tmp_path: Path) -> None:
    subprocess.run(
        [ROOT / "containers" / "write_sbom", tmp_path / "sbom.json", sys.executable],
        check=True,
        timeout=RESOLVE_SECONDS,
    )
    found = json.loads((tmp_path / "sbom.json").read_text())
    assert found["bomFormat"] == "CycloneDX"
    assert found["metadata"]["component"]["name"] == "glm-image-triton"
    versions = {one["name"].lower(): one["version"] for one in found["components"]}
    for name in ("numpy", "torch", "tritonclient"):
        assert versions[name] == importlib.metadata.version(name)
    assert "cyclonedx-bom" not in versions


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("target", COMPOSED)
def test_every_pin_resolves(target: str, architecture: str, tmp_path: Path) -> None:
    """What the image's pip is asked for, for its Python and its C library, from wheels alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ["client", "server", "gateway", "tracing", "download", *(["npu"] if target == "ascend" else [])]
    requirements = [
        *project["dependencies"],
        *(line for extra in extras for line in project["optional-dependencies"][extra]),
    ]
    platforms = [f"--platform=manylinux_2_{minor}_{architecture}" for minor in range(39, 4, -1)]
    report = tmp_path / "report.json"
    options = [
        *("--dry-run", "--ignore-installed", "--quiet", "--only-binary=:all:"),
        *(*platforms, f"--platform=manylinux2014_{architecture}", "--python-version=3.12", "--implementation=cp"),
        *("--abi=cp312", "--abi=abi3", "--abi=none", "--target", str(tmp_path / "target"), "--report", str(report)),
        *("-c", str(ROOT / "constraints.txt")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *requirements],
        capture_output=True,
        text=True,
        timeout=RESOLVE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    chosen = json.loads(report.read_text())["install"]
    files = [*extras, "cuda"]
    locked = "".join((ROOT / "requirements" / f"{name}.txt").read_text() for name in files)
    for one in chosen:
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        assert f"--hash=sha256:{digest}" in locked, one["metadata"]["name"]
    pins = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins}
    metadata = [one["metadata"] for one in chosen]
    versions = {one["name"].lower().replace("_", "-"): one["version"] for one in metadata}
    assert {name: pinned.get(name) for name in versions} == versions

"""requirements/*.txt: complete, hashed, and in step with pyproject.toml and constraints.txt; and their installation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lock

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
GROUPS: dict[str, list[str]] = PROJECT["dependency-groups"]
FILES = {path.stem: path.read_text() for path in (ROOT / "requirements").glob("*.txt")}
INSTALL_SECONDS = 300
RERUN = "run ./scripts/lock"


def load_installer() -> Any:
    spec = importlib.util.spec_from_file_location("install_locked", ROOT / "scripts" / "lib" / "install_locked.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install_locked = load_installer()


def pins_of(name: str) -> dict[str, str]:
    """Package -> version of a file."""
    blocks = [block.split()[0].split("==") for block in install_locked.blocks_of(name)]
    return {canonicalize_name(package): version for package, version in blocks}


PINS = {name: pins_of(name) for name in FILES}


def constraints_in(path: Path) -> dict[str, str]:
    """Package -> version of a file of constraints."""
    pins = (line.split("==") for line in path.read_text().splitlines() if "==" in line)
    return {canonicalize_name(package): version for package, version in pins}


OWN_CONSTRAINTS: dict[str, str] = PROJECT["tool"]["glm-image"]["own-constraints"]


def direct_requirements() -> Iterator[tuple[str, Requirement]]:
    """File -> what pyproject.toml names for it."""
    yield from (("build", Requirement(line)) for line in PROJECT["build-system"]["requires"])
    yield from ((name, Requirement(line)) for name, lines in GROUPS.items() for line in lines)
    for name, lines in EXTRAS.items():
        yield from ((name, Requirement(line)) for line in PROJECT["project"]["dependencies"] + lines)


def test_every_extra_and_tool_has_a_file() -> None:
    assert set(FILES) == {*EXTRAS, *GROUPS, "build", "cuda", "cpu"}, RERUN


@pytest.mark.parametrize("name", FILES)
def test_every_package_has_a_hash_and_no_build_script_runs(name: str) -> None:
    assert "\n--only-binary :all:\n" in FILES[name]
    blocks = install_locked.blocks_of(name)
    assert blocks
    for block in blocks:
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.!+]+( ; [\w\"=. ]+)?( +--hash=sha256:[0-9a-f]{64})+", block), block


def test_what_the_project_names_is_pinned_as_in_the_constraints() -> None:
    for name, requirement in direct_requirements():
        version = PINS[name].get(canonicalize_name(requirement.name))
        assert version is not None, f"{name} lacks {requirement}: {RERUN}"
        assert requirement.specifier.contains(version), f"{name}: {requirement}: {RERUN}"


def test_pins_equal_the_constraints() -> None:
    used: dict[str, set[str]] = {}
    for name in set(PINS) - {"cpu"}:
        file, pins = OWN_CONSTRAINTS.get(name, "constraints.txt"), PINS[name]
        constraints = constraints_in(ROOT / file)
        assert pins == {package: constraints.get(package) for package in pins}, f"{name}: {RERUN}"
        used.setdefault(file, set()).update(pins)
    assert set(used) == {"constraints.txt", *OWN_CONSTRAINTS.values()}
    for file, packages in used.items():
        assert not set(constraints_in(ROOT / file)) - packages, f"{file} pins what nothing needs"


@pytest.mark.parametrize("name", EXTRAS)
def test_what_packages_need_is_in_the_file(name: str) -> None:
    """For those that are installed here."""
    present = set(PINS[name]) | (set(PINS["cuda"]) if "torch" in PINS[name] else set())
    for package in PINS[name]:
        try:
            needed = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, needed):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in present, f"{name}: {package} needs it: {RERUN}"


def test_cuda_libraries_are_apart() -> None:
    assert any(package.startswith("nvidia-cu") for package in PINS["cuda"])
    assert not any(package.startswith(("nvidia-cu", "cuda-")) for package in PINS["server"])
    assert PINS["cpu"]["torch"].split("+") == [PINS["server"]["torch"], "cpu"]


class TestLock:
    def test_a_group_may_have_constraints_of_its_own(self) -> None:
        assert lock.constraints_of(PROJECT, "kubernetes") == ROOT / "deploy" / "constraints.txt"
        assert lock.constraints_of(PROJECT, "sbom") == ROOT / "constraints.txt"

    def wheel(self, file: str) -> dict[str, Any]:
        return {"url": f"somewhere/{file}", "hashes": {"sha256": file[:1] * 64}}

    def test_wheels_of_other_machines_are_left_out(self) -> None:
        files = ["a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "a-1-cp312-cp312-musllinux_1_2_x86_64.whl"]
        wheels = [self.wheel(file) for file in [*files, "b-1-py3-none-any.whl"]]
        entry = lock.entry({"name": "a", "version": "1", "wheels": wheels, "marker": "sys_platform == 'linux'"})
        assert entry == f"a==1 \\\n    --hash=sha256:{'a' * 64} \\\n    --hash=sha256:{'b' * 64}"

    def test_a_machine_without_a_wheel_is_refused(self) -> None:
        package = {"name": "a", "version": "1", "wheels": [self.wheel("a-1-cp311-cp311-manylinux_2_28_x86_64.whl")]}
        with pytest.raises(lock.LockError, match=r"a 1 has no wheel for Python 3\.12 on x86_64"):
            lock.entry({**package, "marker": "platform_machine == 'x86_64'"})
        assert lock.entry(package).startswith('a==1 ; platform_machine == "x86_64" and python_version == "3.11" \\\n')
        assert lock.entry({**package, "marker": "sys_platform == 'win32'"}) == ""

    def test_a_cpu_build_of_another_version_is_refused(self) -> None:
        file = "torch-1.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
        with pytest.raises(lock.LockError, match=rf"{re.escape(file)}.*constraints.txt pins torch"):
            lock.cpu_builds({file: "sha256:0"})

    def test_packages_without_a_pin_are_appended_once(self) -> None:
        text = lock.with_pins("a==1\n", ["b==2"])
        assert text == f"a==1\n\n{lock.ADDED}\nb==2\n"
        assert lock.with_pins(text, ["c==3"]) == text + "c==3\n"


class TestInstall:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
        """What pip is asked for, with the content of requirements files."""
        calls: list[tuple[str, ...]] = []

        def pip(*arguments: str, check: bool = True) -> None:
            *options, last = arguments
            calls.append((*options, Path(last).read_text() if last.endswith(".txt") else last))

        monkeypatch.setattr(install_locked, "pip", pip)
        return calls

    def test_only_hashed_packages_and_the_project_are_installed(self, calls: list[tuple[str, ...]]) -> None:
        assert install_locked.main(["plan", "client"]) == 0
        packages, project, check = calls
        assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(packages)
        assert all(f"\n{name}==" in packages[-1] for name in ("simpy", "tritonclient", "numpy"))
        assert packages[-1].startswith("setuptools==")
        assert project == ("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        assert check == ("check",)

    def test_a_cpu_build_is_preferred_and_a_vendors_package_kept(
        self, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = {"torch": None, "numpy": "1.26.4"}
        monkeypatch.setattr(install_locked, "installed", versions.get)
        monkeypatch.setattr(install_locked, "torch_needs_cuda", lambda: True)
        assert install_locked.main(["--keep", "numpy,triton", "server"]) == 0
        assert [calls[0][-1].split()[0], calls[1][-1].count("torch=="), calls[1][-1].count("numpy==")] == [
            f"torch=={PINS['cpu']['torch']}", 1, 0,
        ]  # fmt: skip
        assert "nvidia-cublas" in calls[2][-1]
        calls.clear()
        versions["torch"] = PINS["cpu"]["torch"]
        assert install_locked.main(["server"]) == 0
        assert "\ntorch==" not in calls[1][-1]

    def test_a_missing_file_is_named(self, calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]) -> None:
        assert install_locked.main(["nothing"]) == 1
        assert re.search(r"nothing\.txt is missing: scripts/lock writes it", capsys.readouterr().err)


@pytest.mark.full
def test_the_files_are_what_the_lock_script_writes() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "lock", "--check"], capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.full
def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    """In an environment of its own, with the real pip."""
    copy = tmp_path / "copy"
    for name in ("requirements", "scripts", "python_backends", "client"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    command = [tmp_path / "venv" / "bin" / "python3", copy / "scripts" / "lib" / "install_locked.py", "--quiet", "plan"]
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS)
    subprocess.run([command[0], "-c", "import glm_image.errors, simpy"], check=True)
    plan = copy / "requirements" / "plan.txt"
    plan.write_text(re.sub(r"(simpy==.*\n +--hash=sha256:)\w{4}", r"\g<1>0000", plan.read_text()))
    subprocess.run([command[0], "-m", "pip", "uninstall", "--quiet", "--yes", "simpy"], check=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr

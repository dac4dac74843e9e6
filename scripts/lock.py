"""Writes ``requirements/NAME.txt`` for each extra and dependency group of pyproject.toml: packages with their hashes.

uv resolves each of them, for all environments of ``tool.uv`` in pyproject.toml, under the versions of constraints.txt,
or of the file that ``tool.glm-image.own-constraints`` names for a group. A package that its file does not pin gets a
line there first.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENTS = ROOT / "requirements"
ADDED = "# Added by scripts/lock"
PYTHONS = ((3, 11), (3, 12))
MACHINES = ("x86_64", "aarch64")
NEWEST_GLIBC = 39

OF_CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
"""Names of packages that a torch with CUDA needs and a CPU build does not; they have a file of their own."""

Package = dict[str, Any]
"""An entry of ``packages`` in a pylock.toml (PEP 751)."""


class LockError(Exception):
    """The files cannot be written; the message names the package or the input."""


@dataclass(frozen=True)
class Target:
    """A kind of machine that the files cover."""

    python: tuple[int, int]
    machine: str

    @property
    def version(self) -> str:
        return "{}.{}".format(*self.python)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of markers that differ from those of the running Python."""
        return {
            "python_version": self.version,
            "python_full_version": f"{self.version}.9",
            "platform_machine": self.machine,
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }

    @property
    def tags(self) -> frozenset[Tag]:
        platforms = [f"manylinux_2_{minor}_{self.machine}" for minor in range(NEWEST_GLIBC, 4, -1)]
        platforms += [f"manylinux2014_{self.machine}", f"linux_{self.machine}"]
        own, common = cpython_tags(self.python, platforms=platforms), compatible_tags(self.python, platforms=platforms)
        return frozenset([*own, *common])


TARGETS = [Target(python, machine) for python in PYTHONS for machine in MACHINES]
TAGS = {target: target.tags for target in TARGETS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="lock", description="Writes requirements/*.txt.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    check: bool = parser.parse_args().check
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        missing = unpinned(project)
        if not check:
            for path, lines in missing.items():
                path.write_text(with_pins(_text(path), lines), encoding="utf-8")
        files = requirement_files(project)
    except LockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    changed = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    stale = sorted(set(REQUIREMENTS.glob("*.txt")) - set(files))
    for path in [*changed, *stale]:
        print(f"{'differs' if check else 'written' if path in files else 'removed'}: {path.relative_to(ROOT)}")
    for path, lines in missing.items():
        for line in lines:
            print(f"{'not in' if check else 'added to'} {path.relative_to(ROOT)}: {line}")
    if check:
        return int(bool(changed or stale or missing))
    for path in changed:
        path.write_text(files[path], encoding="utf-8")
    for path in stale:
        path.unlink()
    return 0


def constraints_of(project: Mapping[str, Any], group: str) -> Path:
    """Returns the file that pins the versions of a dependency group."""
    return ROOT / project["tool"]["glm-image"]["own-constraints"].get(group, CONSTRAINTS)


def unpinned(project: Mapping[str, Any]) -> dict[Path, list[str]]:
    """Returns, for each file of constraints that lacks any, a line ``name==version`` for every package to pin."""
    needed = {CONSTRAINTS: resolve("pyproject.toml", "--all-extras")}
    for group in project["dependency-groups"]:
        path = constraints_of(project, group)
        needed.setdefault(path, []).extend(resolve("--group", group, constraints=path))
    missing = {}
    for path, packages in needed.items():
        pinned = {canonicalize_name(line.partition("==")[0]) for line in _text(path).splitlines()}
        missing[path] = sorted({f"{one['name']}=={one['version']}" for one in packages if one["name"] not in pinned})
    return {path: lines for path, lines in missing.items() if lines}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def with_pins(text: str, lines: Sequence[str]) -> str:
    """Returns the text of constraints.txt with ``lines`` at its end."""
    head = "" if ADDED in text else f"\n{ADDED}\n"
    return text.rstrip("\n") + "\n" + head + "".join(f"{line}\n" for line in lines)


def requirement_files(project: Mapping[str, Any]) -> dict[Path, str]:
    """Returns the content of every file in requirements/."""
    metadata, build = project["project"], project["build-system"]["requires"]
    contents = {"build": (build, resolve("-", stdin="\n".join(build)))}
    for group, direct in project["dependency-groups"].items():
        contents[group] = (direct, resolve("--group", group, constraints=constraints_of(project, group)))
    for extra, direct in metadata["optional-dependencies"].items():
        contents[extra] = (metadata["dependencies"] + direct, resolve("pyproject.toml", "--extra", extra))
    of_cuda: dict[str, Package] = {}
    texts = {}
    for name, (direct, packages) in contents.items():
        own = {canonicalize_name(Requirement(line).name) for line in direct}
        brought = (
            {}
            if "torch" not in own
            else {one["name"]: one for one in packages if OF_CUDA.fullmatch(one["name"]) and one["name"] not in own}
        )
        of_cuda |= brought
        texts[name] = text_of(name, [one for one in packages if one["name"] not in brought])
    texts["cuda"] = text_of("cuda", list(of_cuda.values()))
    texts["cpu"] = text_of("cpu", cpu_builds(project["tool"]["glm-image"]["cpu-builds"]))
    return {REQUIREMENTS / f"{name}.txt": text for name, text in texts.items()}


def resolve(*what: str, stdin: str = "", constraints: Path = CONSTRAINTS) -> list[Package]:
    """Has uv resolve a set of requirements under a file of constraints, for all environments."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pylock.toml"
        command = [uv, "pip", "compile", *what, "--universal", "--python-version", "{}.{}".format(*PYTHONS[0])]
        command += ["--constraints", constraints, "--output-file", output, "--no-header", "--quiet"]
        done = subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LockError(f"uv cannot resolve {' '.join(what)}:\n{done.stderr}")
        packages: list[Package] = tomllib.loads(output.read_text(encoding="utf-8")).get("packages", [])
        return packages


def cpu_builds(hashes: Mapping[str, str]) -> list[Package]:
    """Returns the packages of wheels that are not on the index, from their file names and hashes."""
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if "==" in line)
    packages: dict[str, Package] = {}
    for file, digest in hashes.items():
        name, version, *_ = parse_wheel_filename(file)
        if version.public != pins.get(name):
            raise LockError(f"cpu-builds of pyproject.toml has {file}; constraints.txt pins {name} {pins.get(name)}")
        package = packages.setdefault(f"{name}=={version}", {"name": name, "version": str(version), "wheels": []})
        package["wheels"].append({"url": file, "hashes": {"sha256": digest.removeprefix("sha256:")}})
    return list(packages.values())


def text_of(name: str, packages: Sequence[Package]) -> str:
    """Returns the content of a file."""
    head = f"# What {name!r} of pyproject.toml installs. Written by scripts/lock: do not edit.\n--only-binary :all:\n"
    return "\n".join([head, *filter(None, map(entry, packages))]) + "\n"


def entry(package: Package) -> str:
    """Returns the lines of a package; "" if no target needs it.

    Raises:
        LockError: a target that needs the package has no wheel of it.
    """
    name, version = package["name"], package["version"]
    wheels = {wheel["url"].rpartition("/")[2]: wheel["hashes"]["sha256"] for wheel in package.get("wheels", ())}
    tags = {file: parse_wheel_filename(file)[3] for file in wheels}
    fitting = {target: {file for file in wheels if tags[file] & TAGS[target]} for target in TARGETS}
    # A build for one kind of machine, as those of cpu-builds, is for that kind alone.
    marker = Marker(package["marker"]) if "marker" in package else None
    if marker is None:
        needed = [target for target in TARGETS if fitting[target]]
    else:
        needed = [target for target in TARGETS if marker.evaluate(target.environment)]
    for target in needed:
        if not fitting[target]:
            raise LockError(f"{name} {version} has no wheel for Python {target.version} on {target.machine}")
    if not needed:
        return ""
    files = sorted(set().union(*(fitting[target] for target in needed)))
    return " \\\n".join(
        [f"{name}=={version}{condition(needed)}", *(f"    --hash=sha256:{wheels[file]}" for file in files)]
    )


def condition(needed: Sequence[Target]) -> str:
    """Returns the marker that is true for some of ``TARGETS``; "" for all."""
    pythons = sorted({target.python for target in needed})
    machines = sorted({target.machine for target in needed})
    if len(needed) != len(pythons) * len(machines):
        raise LockError(f"no marker is known for {needed}")
    terms = []
    if len(machines) < len(MACHINES):
        terms.append(f'platform_machine == "{machines[0]}"')
    if len(pythons) < len(PYTHONS):
        terms.append('python_version == "{}.{}"'.format(*pythons[0]))
    return f" ; {' and '.join(terms)}" if terms else ""


if __name__ == "__main__":
    sys.exit(main())

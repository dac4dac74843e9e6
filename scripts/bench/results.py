"""Result files: a run of one benchmark as JSON, with the commit, device, host, versions, arguments and date.

Needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
BENCHMARKS = (
    "ar", "speculation", "dit", "vae", "i2i", "linears", "quantized", "previews", "cancel", "bus", "parallel",
    "served", "stream", "streaming", "cards", "plan", "fleet", "soak", "gateway",
)  # fmt: skip
THIS_RUN = "this run"
IDENTIFYING = ("running", "sources", "guidance", "devices", "requests", "concurrency", "rate", "size")
"""Numbers that say what a measure is of, not what was measured."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One run of a benchmark.

    Attributes:
        benchmark: its name.
        label: which of several runs on one device: "" or such as ``int8``.
        source: ``this run``, or where the figures come from.
        date: ISO 8601, in UTC; "" where unknown.
        commit: the revision that was measured; "" where unknown.
        device: the device's name.
        host: the CPU's model and its number of cores.
        versions: of Python and the packages that compute.
        arguments: of the benchmark, with the last name of an absolute path in its place.
        measures: the lines that it printed.
    """

    benchmark: str
    label: str
    source: str
    date: str
    commit: str
    device: str
    host: dict[str, Any]
    versions: dict[str, str]
    arguments: list[str]
    measures: list[Line]

    @property
    def file_name(self) -> str:
        """DEVICE-BENCHMARK[-LABEL].json: a later run replaces an earlier one."""
        return f"{'-'.join(filter(None, (slug(self.device), self.benchmark, self.label)))}.json"

    def save(self, folder: Path) -> Path:
        """Writes the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        head = {name: value for name, value in asdict(self).items() if name != "measures"}
        lines = ",\n".join(f"  {json.dumps(line, ensure_ascii=False)}" for line in self.measures)
        text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        path.write_text(f'{text},\n "measures": [\n{lines}\n ]\n}}\n', encoding="utf-8")
        return path

    def find(self, measure: str, **fields: Any) -> Iterator[Line]:
        """Yields the lines of a measure whose fields have these values."""
        for line in self.measures:
            if line["measure"] == measure and all(line.get(name) == value for name, value in fields.items()):
                yield line


def read(path: Path) -> Result:
    """Reads a result file.

    Raises:
        ValueError: it is none.
    """
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: no result of a benchmark: {error}") from error


def read_all(paths: Sequence[Path]) -> list[Result]:
    """Reads result files, and those in folders."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    return [read(file) for file in files]


def slug(text: str) -> str:
    """Returns a text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def execute(benchmark: str, label: str, arguments: Sequence[str], commit: str = "") -> tuple[Result, int]:
    """Runs a benchmark in a process of its own and prints its lines as they come; returns its result and exit code."""
    command = [sys.executable, str(FOLDER / f"{benchmark}.py"), *arguments]
    lines = []
    environment = {**os.environ, "PYTHONPATH": search_path()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for text in process.stdout or ():
            print(text, end="", flush=True)
            if text.startswith("{"):
                lines.append(json.loads(text))
    about: Line = next((line for line in lines if line["measure"] == "device"), {})
    result = Result(
        benchmark=benchmark,
        label=label,
        source=THIS_RUN,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit or revision(),
        device=host()["cpu"] if about.get("device", "cpu") == "cpu" else about["device"],
        host=host(),
        versions=about.get("versions", {}),
        arguments=[Path(argument).name if argument.startswith("/") else argument for argument in arguments],
        measures=[line for line in lines if line is not about],
    )
    return result, process.returncode


def search_path() -> str:
    """Returns PYTHONPATH with the packages of this repository first."""
    root = FOLDER.parents[1]
    own = [str(root / name) for name in ("python_backends", "client", "scripts")]
    return os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])


def revision() -> str:
    """Returns the commit of this checkout, marked if files differ from it; "" outside of git."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""


def host() -> dict[str, Any]:
    """Returns the CPU's model and its number of cores."""
    try:
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        models = []
    return {"cpu": models[0] if models else "unknown", "cores": os.cpu_count()}


def keyed(lines: Sequence[Line]) -> dict[str, Line]:
    """Returns lines by the text of what they measure; a text's second line gets its number."""
    seen: Counter[str] = Counter()
    found = {}
    for line in lines:
        fields = [
            f"{name} {value}"
            for name, value in line.items()
            if name != "measure" and (isinstance(value, str) or name in IDENTIFYING)
        ]
        key = ", ".join([line["measure"], *fields])
        seen[key] += 1
        found[key if seen[key] == 1 else f"{key} ({seen[key]})"] = line
    return found


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the measured numbers of a line."""
    return {
        name: value
        for name, value in line.items()
        if name not in IDENTIFYING and isinstance(value, int | float) and not isinstance(value, bool)
    }

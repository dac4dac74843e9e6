"""``python -m glm_image.supervisor`` as a process over small models, its descendants, and requests held in a model."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_image.watchdog.leftovers import SHARED_MEMORY

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
END_TIMEOUT_SECONDS = 60

CONFIG = """
backend: "python"
max_batch_size: 0
input [{ name: "command" data_type: TYPE_STRING dims: [1] }]
output [{ name: "reply" data_type: TYPE_STRING dims: [1] }]
instance_group [{ count: 1 kind: KIND_CPU }]
"""


def write_model(repository: Path, name: str, source: str) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG)
    (repository / name / "1" / "model.py").write_text(source)


def call(http_url: str, do: str, **arguments: object) -> object:
    command = json.dumps({"do": do, "with": arguments})
    body = {"inputs": [{"name": "command", "shape": [1], "datatype": "BYTES", "data": [command]}]}
    request = urllib.request.Request(f"http://{http_url}/v2/models/worker/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=END_TIMEOUT_SECONDS) as response:
        return json.loads(json.load(response)["outputs"][0]["data"][0])


class Served:
    """``python -m glm_image.supervisor`` as a process, and its descendants.

    Args:
        flags: of the command.
        stderr: a descriptor for its log, in place of the file ``log``.
        environment: changes of the environment; None removes a variable.
        options: of the process.
    """

    def __init__(
        self,
        checkpoint: Path,
        repository: Path,
        *flags: str,
        stderr: int | None = None,
        environment: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> None:
        ports = [flag for kind in ("http", "grpc", "metrics") for flag in (f"--{kind}-port", "0")]
        self.log = repository.parent / f"log{len(list(repository.parent.glob('log*')))}"
        variables = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY_ROOT / "python_backends"),
            **(environment or {}),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "glm_image.supervisor", "--checkpoint", str(checkpoint)),
                    *("--model-repository", str(repository), *ports, *flags),
                ],
                stdout=subprocess.PIPE,
                stderr=log if stderr is None else stderr,
                text=True,
                env={name: value for name, value in variables.items() if value is not None},
                **options,
            )

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        assert self.ready_line.startswith("ready: http://"), self.log.read_text()
        self.http_url = self.ready_line.split()[1].removeprefix("http://")
        self.family = descendants(self.process.pid)
        # Supervisor, then watchdog, tritonserver and stub.
        assert len(self.family) == 3
        self.watchdog, self.triton, self.stub = self.family
        self.regions = regions_of(self.triton)
        assert self.regions
        self.run_directory = Path(f"/proc/{self.triton}/cwd").readlink().parents[1]

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(END_TIMEOUT_SECONDS)

    def assert_gone(self) -> None:
        for pid in self.family:
            wait_gone(pid)
        assert not [region for region in self.regions if region.exists()]
        assert not self.run_directory.exists()


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kills the supervisor at the end of the test, which ends its descendants."""
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def descendants(pid: int) -> list[int]:
    """Returns all descendants of ``pid``, parents before children."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family[1:]


def regions_of(pid: int) -> list[Path]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sorted({Path(line.split()[-1]) for line in maps if f"{SHARED_MEMORY}/glm_image_" in line})


def wait_gone(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], END_TIMEOUT_SECONDS)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


class HeldRequest:
    """A request that the model holds until ``release``."""

    def __init__(self, http_url: str, folder: Path) -> None:
        self._entered, self._go = folder / "entered", folder / "go"
        os.mkfifo(self._entered)
        os.mkfifo(self._go)
        self.reply: object = None
        self._thread = threading.Thread(target=self._call, args=(http_url,))
        self._thread.start()
        assert self._entered.read_text() == "entered"

    def _call(self, http_url: str) -> None:
        try:
            self.reply = call(http_url, "hold", entered=str(self._entered), go=str(self._go))
        except OSError as error:
            self.reply = error

    def release(self) -> object:
        self._go.write_text("done")
        return self.wait()

    def wait(self) -> object:
        self._thread.join(END_TIMEOUT_SECONDS)
        return self.reply


def wait_for_log(served: Served, text: str) -> None:
    """Follows the supervisor's log until a line contains ``text``; fails if the supervisor ends first."""
    command = ["tail", "-n", "+1", f"--pid={served.process.pid}", "-F", str(served.log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        try:
            assert any(text in line for line in tail.stdout)
        finally:
            tail.kill()

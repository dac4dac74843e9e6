"""A server on the stand-in for CANN, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 600


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        process: ``serve``.
        http, grpc: its addresses.
        log_file: its standard error.
    """

    process: subprocess.Popen[str]
    http: str
    grpc: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")


@contextmanager
def serving(npu: Mapping[str, str], log: Path, *flags: object, **variables: str) -> Iterator[Served]:
    """Serves the tiny checkpoint until the block ends; ``npu`` are the variables of a process on the stand-in."""
    ports = [flag for kind in ("http", "grpc", "metrics") for flag in (f"--{kind}-port", "0")]
    command = [f"{npu['VIRTUAL_ENV']}/bin/python", "-m", "glm_image.supervisor", "--checkpoint", "checkpoints/tiny"]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*command, *map(str, flags), *ports],
            cwd=ROOT,
            env={**npu, **variables},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready.startswith("ready: "), log.read_text()[-6000:]
            yield Served(process, *ready.split()[1:3], log)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise

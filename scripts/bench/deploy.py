"""How a benchmark's own server is set up: parameters changed in a copy of the model repository, and CUDA MPS."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from glm_image.supervisor.settings import default_model_repository

MPS_CONTROL = "nvidia-cuda-mps-control"
MPS_SECONDS = 20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of what is here."""
    parser.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="MODEL.NAME=VALUE",
        help="a parameter of config.pbtxt, as glm_dit.load_format=dummy; any number of times; "
        "devices sets the number of instances too",
    )
    parser.add_argument("--mps", action="store_true", help="run the server's processes under CUDA MPS")


@contextmanager
def repository_with(repository: Path | None, parameters: Sequence[str], models: str = "*") -> Iterator[Path | None]:
    """A copy of a model repository whose configs have other parameters; the repository itself where there are none.

    ``models`` is the pattern of those that the copy has.
    """
    if not parameters:
        yield repository
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "model_repository")
        for model in (repository or default_model_repository()).glob(models):
            shutil.copytree(model, copy / model.name)
        for parameter in parameters:
            set_parameter(copy, parameter)
        yield copy


def set_parameter(repository: Path, parameter: str) -> None:
    """Sets one ``MODEL.NAME=VALUE``; whether it is allowed is the model's to say."""
    name, _, value = parameter.partition("=")
    model, _, key = name.partition(".")
    path = repository / model / "config.pbtxt"
    if not (key and value and path.is_file()):
        raise SystemExit(f"--parameter is {parameter!r}; allowed: MODEL.NAME=VALUE, MODEL one of {repository}")
    config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    config.parameters[key].string_value = value
    if key == "devices":
        config.instance_group[0].count = len(value.split(";"))
    path.write_text(text_format.MessageToString(config), encoding="utf-8")


@contextmanager
def cuda_mps() -> Iterator[None]:
    """CUDA's Multi-Process Service for the processes started inside: their kernels may then run at the same time.

    Its server is started here rather than by the first client, for which a failure would be one of CUDA's own.
    """
    if shutil.which(MPS_CONTROL) is None:
        raise SystemExit(f"--mps needs {MPS_CONTROL}, which comes with NVIDIA's driver; it is not on PATH")
    # Sockets lie there, whose paths must be short; a daemon that is slow to end may still write.
    with tempfile.TemporaryDirectory(prefix="mps", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        folders = dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), scratch)
        os.environ |= folders
        try:
            # Not through pipes, which the daemon would keep open.
            with Path(scratch, "start.log").open("w") as log:
                started = subprocess.run([MPS_CONTROL, "-d"], stdout=log, stderr=log, timeout=MPS_SECONDS, check=False)
            if started.returncode == 0:
                tell_mps(f"start_server -uid {os.getuid()}")
            if not any(mps_servers() or time.sleep(1) for _ in range(MPS_SECONDS)):
                raise SystemExit(f"--mps: no MPS server starts here; {_last_lines(Path(scratch))}")
            yield
        finally:
            tell_mps(f"quit -t {MPS_SECONDS // 2}")
            for name in folders:
                os.environ.pop(name, None)


def tell_mps(command: str) -> list[str]:
    """Gives the control daemon a command; returns the lines of its answer, none where it gives no answer."""
    try:
        told = subprocess.run(
            [MPS_CONTROL], input=f"{command}\n", capture_output=True, text=True, timeout=MPS_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return []
    return told.stdout.split("\n") if told.returncode == 0 else []


def mps_servers() -> list[str]:
    """The processes of MPS servers that the daemon has started."""
    return [line.strip() for line in tell_mps("get_server_list") if line.strip().isdigit()]


def mps_clients() -> list[str]:
    """The processes that compute through them: one that found no daemon computes by itself, and says nothing."""
    lines = [line.strip() for server in mps_servers() for line in tell_mps(f"get_client_list {server}")]
    return [line for line in lines if line.isdigit()]


def _last_lines(folder: Path) -> str:
    texts = [path.read_text(errors="replace").strip() for path in sorted(folder.glob("*.log"))]
    said = [text.splitlines()[-1] for text in texts if text]
    return "; ".join(said) or f"{MPS_CONTROL} says nothing about why"


@contextmanager
def deployed(flags: argparse.Namespace) -> Iterator[Path | None]:
    """What the flags ask for, for as long as it is needed; gives the model repository."""
    with cuda_mps() if flags.mps else nullcontext(), repository_with(flags.model_repository, flags.parameter) as copy:
        yield copy

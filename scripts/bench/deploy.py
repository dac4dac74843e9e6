"""The set-up of a benchmark's own server: a model repository with other parameters, and CUDA MPS."""

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
    """Adds the flags of ``deployed``."""
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
    """Yields a copy of a model repository with other parameters, or the repository itself if there are none.

    Args:
        repository: the original; None = the built-in one.
        parameters: ``MODEL.NAME=VALUE`` each.
        models: a pattern of the models that the copy contains.
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
    """Sets one ``MODEL.NAME=VALUE``; the model refuses a value that is not allowed when it is loaded."""
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
    """Runs CUDA's Multi-Process Service for the processes started inside, so that their kernels can overlap.

    Starts the MPS server too: if the first client did, its failure would surface as a CUDA error.
    """
    if shutil.which(MPS_CONTROL) is None:
        raise SystemExit(f"--mps needs {MPS_CONTROL}, which comes with NVIDIA's driver; it is not on PATH")
    # The folder has sockets, whose paths must be short; a daemon that ends slowly may still write to it.
    with tempfile.TemporaryDirectory(prefix="mps", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        folders = dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), scratch)
        os.environ |= folders
        try:
            # To a file: the daemon would keep a pipe open.
            with Path(scratch, "start.log").open("w") as log:
                started = subprocess.run([MPS_CONTROL, "-d"], stdout=log, stderr=log, timeout=MPS_SECONDS, check=False)
            if started.returncode == 0:
                send_to_mps(f"start_server -uid {os.getuid()}")
            deadline = time.monotonic() + MPS_SECONDS
            while not mps_servers() and time.monotonic() < deadline:
                time.sleep(1)
            if not mps_servers():
                raise SystemExit(f"--mps: no MPS server started; {_last_lines(Path(scratch))}")
            yield
        finally:
            send_to_mps(f"quit -t {MPS_SECONDS // 2}")
            for name in folders:
                os.environ.pop(name, None)


def send_to_mps(command: str) -> list[str]:
    """Sends the control daemon a command; returns the lines of its response, [] if it gives none."""
    try:
        ended = subprocess.run(
            [MPS_CONTROL], input=f"{command}\n", capture_output=True, text=True, timeout=MPS_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return []
    return ended.stdout.split("\n") if ended.returncode == 0 else []


def mps_servers() -> list[str]:
    """Returns the process ids of the MPS servers that the daemon has started."""
    return [line.strip() for line in send_to_mps("get_server_list") if line.strip().isdigit()]


def mps_clients() -> list[str]:
    """Returns the process ids of the MPS clients; a process that finds no daemon silently runs without MPS."""
    lines = [line.strip() for server in mps_servers() for line in send_to_mps(f"get_client_list {server}")]
    return [line for line in lines if line.isdigit()]


def _last_lines(folder: Path) -> str:
    texts = [path.read_text(errors="replace").strip() for path in sorted(folder.glob("*.log"))]
    last = [text.splitlines()[-1] for text in texts if text]
    return "; ".join(last) or f"{MPS_CONTROL} logged nothing"


@contextmanager
def deployed(flags: argparse.Namespace) -> Iterator[Path | None]:
    """Sets up what the flags name; yields the model repository."""
    with cuda_mps() if flags.mps else nullcontext(), repository_with(flags.model_repository, flags.parameter) as copy:
        yield copy

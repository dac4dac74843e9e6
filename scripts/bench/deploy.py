"""How a benchmark's own server is set up: parameters changed in a copy of the model repository, and CUDA MPS."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from glm_image.supervisor.settings import default_model_repository

MPS_CONTROL = "nvidia-cuda-mps-control"


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
    """CUDA's Multi-Process Service for the processes started inside: their kernels may then run at the same time."""
    if shutil.which(MPS_CONTROL) is None:
        raise SystemExit(f"--mps needs {MPS_CONTROL}, which comes with NVIDIA's driver; it is not on PATH")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"CUDA_MPS_PIPE_DIRECTORY": scratch, "CUDA_MPS_LOG_DIRECTORY": scratch}
        os.environ |= folders
        try:
            subprocess.run([MPS_CONTROL, "-d"], check=True)
            yield
        finally:
            subprocess.run([MPS_CONTROL], input="quit\n", text=True, check=False)
            for name in folders:
                os.environ.pop(name, None)


@contextmanager
def deployed(flags: argparse.Namespace) -> Iterator[Path | None]:
    """What the flags ask for, for as long as it is needed; gives the model repository."""
    with cuda_mps() if flags.mps else nullcontext(), repository_with(flags.model_repository, flags.parameter) as copy:
        yield copy

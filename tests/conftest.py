from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Layers of this size lose more to handing work between threads than they win, and idle threads spin. Set before torch
# is imported, and for the processes that tests start: the order of a sum, and so its last bits, hangs on the number.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

# Kernels run in Triton's interpreter where there is no GPU. Triton looks at this when it is imported, and what follows
# may import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from glm_image.ar.settings import ArSettings
from glm_image.pipeline import LocalPipeline, LocalSettings
from glm_image.supervisor import ServerSettings, TritonServer
from helpers import MakeCheckpoint
from make_tiny_checkpoint import TinyConfig, make_tiny_checkpoint
from parity.reference import load_reference

DRAIN_SECONDS = 5
GROUPED_FOLDERS = {"server", "bad_input", "parity", "deployment", "fleet"}
"""Folders whose modules have expensive fixtures of their own."""

SHARED_SERVERS = {"triton", "bare_triton", "two_instances", "member"}
"""Fixtures."""

# A shell that starts this in the background has it ignore interrupts, and all programs that it starts would.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups tests for ``--dist loadgroup``.

    One process runs all tests of the shared servers: each server starts once, and tests that measure its memory and its
    response times have it to themselves. Modules that start their own servers may run in any process.
    """
    for item in items:
        if SHARED_SERVERS & set(getattr(item, "fixturenames", ())):
            group = "servers"
        elif item.path.parent.name in GROUPED_FOLDERS:
            group = f"{item.path.parent.name}.{item.path.stem}"
        else:
            continue
        item.add_marker(pytest.mark.xdist_group(group))
        # pytest-xdist 3.8 passes the group in the node id, in a field that pytest 9.2 no longer reads.
        if getattr(config.option, "loadgroup", False) and hasattr(item, "_id"):
            item._id = type(item._id).parse(f"{item.nodeid}@{group}")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Makes a checkpoint of other sizes, once a session for each."""
    made: dict[tuple[TinyConfig, bool], Path] = {}

    def make(weights: bool = True, **sizes: Any) -> Path:
        key = (TinyConfig(**sizes), weights)
        if key not in made:
            made[key] = make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", *key)
        return made[key]

    return make


@pytest.fixture(scope="session")
def checkpoint_folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoint_folder: Path) -> Path:
    """What servers serve."""
    return checkpoint_folder


@pytest.fixture(scope="session")
def same_threads() -> Iterator[None]:
    """Servers compute with as many threads as this process: the order of a sum, and so its last bits, hangs on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield


@pytest.fixture(scope="session")
def triton(tiny_checkpoint: Path, same_threads: None) -> Iterator[TritonServer]:
    """The server of all tests that need no other."""
    with TritonServer(ServerSettings(tiny_checkpoint, drain_seconds=DRAIN_SECONDS)) as server:
        yield server
        assert server.returncode is None, server.log_tail


@pytest.fixture(scope="session")
def reference(checkpoint_folder: Path) -> Any:
    """diffusers' pipeline on the tiny checkpoint."""
    return load_reference(checkpoint_folder)


@pytest.fixture(scope="session")
def pipeline(checkpoint_folder: Path) -> Iterator[LocalPipeline]:
    """This project's pipeline on the same checkpoint."""
    settings = LocalSettings(ar=ArSettings(max_sequence_tokens=2048))
    with LocalPipeline(checkpoint_folder, "cpu", settings) as opened:
        yield opened

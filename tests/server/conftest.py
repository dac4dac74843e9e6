"""One real server over the tiny checkpoint for the whole session, and the same engines without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glm_image.pipeline import LocalPipeline
from glm_image.supervisor import TritonServer
from make_tiny_checkpoint import make_tiny_checkpoint

DRAIN_SECONDS = 5


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def same_threads() -> Iterator[None]:
    """Servers compute with as many threads as this process: the order of a sum, and so its last bits, hangs on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield


@pytest.fixture(scope="session")
def triton(tiny_checkpoint: Path, same_threads: None) -> Iterator[TritonServer]:
    with TritonServer(tiny_checkpoint, drain_seconds=DRAIN_SECONDS) as server:
        yield server
        assert server.returncode is None, server.log_tail


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> Iterator[LocalPipeline]:
    with LocalPipeline(tiny_checkpoint, "cpu") as engines:
        yield engines

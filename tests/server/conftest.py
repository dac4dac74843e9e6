"""The engines without a server, with the sizes of the served ones, a server without IPC, and an empty checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.pipeline import LocalPipeline
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image.supervisor.settings import default_model_repository


@pytest.fixture(scope="session")
def bare_triton(
    tiny_checkpoint: Path, same_threads: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server without a run directory, as a Triton started by hand, and with the shared-memory API open.

    ``test_metrics`` is its first user: it expects counters at 0.
    """
    repository = tmp_path_factory.mktemp("bare") / "models"
    shutil.copytree(default_model_repository(), repository, ignore=shutil.ignore_patterns("__pycache__"))
    for model in repository.glob("*/1/model.py"):
        model.write_text(f"import os\n\ndel os.environ[{RUN_DIRECTORY_VARIABLE!r}]\n{model.read_text()}")
    settings = ServerSettings(
        tiny_checkpoint, model_repository=repository, drain_seconds=1, open_apis=("shared-memory",)
    )
    with TritonServer(settings) as server:
        yield server
        assert server.returncode is None, server.log_tail


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> Iterator[LocalPipeline]:
    with LocalPipeline(tiny_checkpoint, "cpu") as engines:
        yield engines


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint for models that load none."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model_index.json").write_text("{}")
    return tmp_path / "checkpoint"

"""The environment of processes on the stand-in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent


def load_environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("npu_environment", FOLDER / "standin" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def npus() -> Callable[[int], dict[str, str]]:
    """Returns the variables of a process that sees some NPUs."""
    environment = load_environment()

    def variables(devices: int) -> dict[str, str]:
        try:
            return dict(environment.standin_environment(devices))
        except RuntimeError as error:  # no compiler, or torch_npu is not to be had
            pytest.skip(str(error))

    return variables


@pytest.fixture(scope="session")
def npu(npus: Callable[[int], dict[str, str]]) -> dict[str, str]:
    """The variables of a process that sees two NPUs."""
    return npus(2)

"""When stages are trained, and where."""

from __future__ import annotations

from threading import Barrier, Lock

import pytest

from train_tiny.__main__ import MINUTES, SAMPLES, parse_arguments
from train_tiny.schedule import ATTEMPTS, NEEDS, train_all


class Trained:
    """Notes the stages that were trained."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.devices: dict[str, str] = {}
        self._lock = Lock()

    def __call__(self, stage: str, device: str) -> None:
        with self._lock:
            assert set(NEEDS[stage]) <= set(self.stages), f"{stage} before what it needs"
            self.stages.append(stage)
            self.devices[stage] = device


def test_every_stage_has_its_place() -> None:
    assert set(NEEDS) == set(SAMPLES) == set(MINUTES)


@pytest.mark.parametrize("devices", [["cpu"], ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1", "cuda:2"]])
def test_each_stage_is_trained_once_and_after_what_it_needs(devices: list[str]) -> None:
    trained = Trained()
    train_all(trained, devices)
    assert sorted(trained.stages) == sorted(NEEDS)
    assert set(trained.devices.values()) <= set(devices)


def test_two_devices_train_two_stages_at_a_time() -> None:
    together = Barrier(2, timeout=60)
    needs = {"vision": (), "vae": (), "painter": ("vae", "vision"), "writer": ("vision",)}
    train_all(lambda stage, device: together.wait() and None, ["cuda:0", "cuda:1"], needs)


def test_a_stage_that_fails_ends_those_that_wait_for_it() -> None:
    begun: list[str] = []

    def train(stage: str, device: str) -> None:
        begun.append(stage)
        raise SystemExit(f"{stage} did not end well")

    with pytest.raises(SystemExit, match="vae did not end well"):
        train_all(train, ["cuda:0", "cuda:1"], {"vae": (), "painter": ("vae",)})
    assert begun == ["vae"] * ATTEMPTS


def test_a_stage_that_fails_once_is_begun_again() -> None:
    begun: list[str] = []

    def train(stage: str, device: str) -> None:
        begun.append(stage)
        if begun == ["vae"]:
            raise SystemExit(f"{stage} did not end well")

    train_all(train, ["cuda:0"], {"vae": (), "painter": ("vae",)})
    assert begun == ["vae", "vae", "painter"]


@pytest.mark.parametrize("option", ["--samples", "--batch"])
def test_a_count_of_0_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["vae", "folder", option, "0"])
    assert "0; allowed: 1 or more" in capsys.readouterr().err

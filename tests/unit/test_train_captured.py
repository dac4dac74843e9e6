"""Captured steps of training do what the same steps do uncaptured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train_tiny import loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")


class Curve:
    """A stage with batches of two kinds, parts for both optimizers, and its own random numbers."""

    name, learning_rate = "curve", 0.02

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(1, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1)).cuda()
        self.inner = (self.module[2],)
        self.drawn = torch.zeros(2, dtype=torch.long, device="cuda")
        self._next = 0

    def kind(self) -> int:
        self._next += 1
        return self._next % 2

    def losses(self, kind: int) -> dict[str, Tensor]:
        x = torch.rand(64 + 64 * kind, 1, device="cuda")
        self.drawn[kind] += 1
        return {"loss": (self.module(x).float() - (6 * x).sin()).square().mean(), "first": x[0, 0]}

    def after_step(self, step: int, progress: float) -> None:
        pass

    def results(self) -> dict[str, Any]:
        return {}


def taken(folder: Path, steps: int) -> tuple[Curve, list[Tensor], int]:
    stage = Curve()
    training = loop.Training(stage, folder / "curve.pt")
    torch.manual_seed(1)
    with loop.own_stream(training.device):
        values = [training.take_step(0.5).clone() for _ in range(steps)]
    assert training.logged == ("loss", "first", "gradient_norm")
    return stage, values, len(training._descend._graphs)


def test_captured_steps_are_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, values, graphs = taken(tmp_path, 200)
    assert graphs == 2, "one for each kind"
    monkeypatch.setattr("train_tiny.captured.RUNS_BEFORE", 10**9)
    plain, wanted, graphs = taken(tmp_path, 200)
    assert graphs == 0
    assert captured.drawn.tolist() == plain.drawn.tolist() == [100, 100]
    firsts = [float(value[1]) for value in values]
    assert len(set(firsts)) == len(firsts), "random numbers are new ones in each replay"
    first, last = (torch.stack(values[some])[:, 0].mean() for some in (slice(10), slice(-10, None)))
    assert last < 0.7 * first
    # After some steps rounding may tell them apart, so that only the course is the same.
    assert torch.allclose(torch.stack(wanted[-10:])[:, 0].mean(), last, rtol=0.2)
    assert torch.allclose(torch.stack(wanted[-10:])[:, 2].mean(), torch.stack(values[-10:])[:, 2].mean(), rtol=0.5)

"""Training picks up where it stopped, ends when it has to, and takes the optimizers' steps."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train_tiny import loop
from train_tiny.muon import Muon


class QueueSnapshot:
    """A stage that fits a line, and stops the clock's budget from mattering."""

    name, learning_rate = "line", 0.1

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(1, 1)
        self.inner: tuple[nn.Module, ...] = ()
        self.steps: list[int] = []

    def kind(self) -> int:
        return 0

    def losses(self, kind: int) -> dict[str, Tensor]:
        x = torch.rand(64, 1)
        return {"loss": (self.module(x) - (3 * x - 1)).square().mean()}

    def after_step(self, step: int, progress: float) -> None:
        self.steps.append(step)

    def results(self) -> dict[str, Any]:
        return {"slope": float(self.module.weight.detach())}


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a millisecond passes between two looks at the clock: the number of steps does not depend on the machine."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 2000))


@pytest.mark.usefixtures("steady_clock")
def test_a_stage_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
    first = QueueSnapshot()

    def stops(step: int, progress: float) -> None:
        if step == 400:
            raise KeyboardInterrupt

    monkeypatch.setattr(first, "after_step", stops)
    with pytest.raises(KeyboardInterrupt):
        loop.train(first, tmp_path, minutes=1)
    with pytest.raises(SystemExit, match="line is not done"):
        loop.finished(tmp_path, "line")
    spent = torch.load(tmp_path / "line.pt")["seconds"]
    second = QueueSnapshot()
    resumed = loop.Training(second, tmp_path / "line.pt")
    groups = [group for optimizer in resumed.optimizers for group in optimizer.param_groups]
    resumed.take_step(0.5)
    assert {float(group["lr"]) for group in groups} == {float(torch.tensor(0.1 * loop.rate(0.5, 400)))}
    second = QueueSnapshot()
    loop.train(second, tmp_path, minutes=(spent + 0.7) / 60)
    assert second.steps[0] == 400
    assert loop.finished(tmp_path, "line")["results"]["slope"] == pytest.approx(3, abs=0.05)
    ends = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [line["step"] for line in ends if line.get("event") == "end"] == [second.steps[-1] + 1]


def test_a_stage_with_non_finite_losses_ends_and_keeps_its_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
    broken = QueueSnapshot()
    losses = broken.losses

    def turns_bad(kind: int) -> dict[str, Tensor]:
        return {"loss": losses(kind)["loss"] * (1.0 if len(broken.steps) < 250 else float("nan"))}

    monkeypatch.setattr(broken, "losses", turns_bad)
    with pytest.raises(SystemExit, match=r"line: not finite at step 300: .*nan"):
        loop.train(broken, tmp_path, minutes=1)
    saved = torch.load(tmp_path / "line.pt")
    assert saved["step"] == 200
    assert all(value.isfinite().all() for value in saved["weights"].values())


def test_non_finite_weights_at_the_end_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS_BETWEEN_LOGS", 10**9)
    broken = QueueSnapshot()
    monkeypatch.setattr(broken, "losses", lambda kind: {"loss": broken.module(torch.ones(1, 1)).sum() * float("nan")})
    with pytest.raises(SystemExit, match="line: not finite after step 0"):
        loop.train(broken, tmp_path, minutes=0.2 / 60)
    assert not (tmp_path / "line.pt").exists()


def test_time_before_the_steps_counts_towards_a_stages_minutes(tmp_path: Path) -> None:
    stage = QueueSnapshot()
    loop.train(stage, tmp_path, minutes=1, began=time.monotonic() - 58)
    assert stage.steps
    assert 60 <= loop.seconds_of(tmp_path, "line") < 90
    log = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 58 for line in log if "seconds" in line)


def test_matrices_of_one_shape_take_muons_step_together_and_go_on_from_its_state() -> None:
    torch.manual_seed(3)
    own = [nn.Parameter(torch.randn(*shape)) for shape in ((16, 16), (32, 16), (16, 32), (16, 16))]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in own]
    one_by_one = torch.optim.Muon(theirs, 0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    rate = torch.tensor(0.01)
    together = Muon(own, rate)
    for _ in range(4):
        for mine, other in zip(own, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        state, together = together.state_dict(), Muon(own, rate)
        together.load_state_dict(state)
        together.step()
        one_by_one.step()
    assert all(torch.allclose(mine, other, atol=1e-4) for mine, other in zip(own, theirs, strict=True))


@pytest.mark.usefixtures("steady_clock")
def test_a_stage_that_is_done_goes_on_when_it_is_given_more_minutes(tmp_path: Path) -> None:
    first, second, third = QueueSnapshot(), QueueSnapshot(), QueueSnapshot()
    loop.train(first, tmp_path, minutes=0.2 / 60)
    assert 0.2 <= loop.seconds_of(tmp_path, "line") < 0.9
    loop.train(second, tmp_path, minutes=0.2 / 60)
    assert second.steps == []
    loop.train(third, tmp_path, minutes=0.9 / 60)
    assert third.steps[0] == first.steps[-1] + 1
    done = loop.finished(tmp_path, "line")
    assert done["step"] == third.steps[-1] + 1
    assert done["seconds"] >= 0.9
    assert done["results"]["slope"] == pytest.approx(3, abs=0.05)


WAITS = """
import threading, torch
from train_tiny import loop
loop.LONGEST_SILENCE = 0.2
loop.expect_progress(torch.device("{}"))
threading.Event().wait({})
"""


def waiting(device: str, seconds: str = "") -> subprocess.CompletedProcess[str]:
    code, scripts = WAITS.format(device, seconds), Path(loop.__file__).parents[1]
    run = [sys.executable, "-c", code]
    return subprocess.run(run, cwd=scripts, capture_output=True, text=True, check=False, timeout=120)


def test_on_a_gpu_a_stage_that_hangs_ends_and_shows_where_it_is() -> None:
    ended = waiting("cuda")
    assert ended.returncode != 0
    assert "Timeout" in ended.stderr
    assert "in wait" in ended.stderr


def test_elsewhere_a_step_takes_as_long_as_it_takes() -> None:
    assert waiting("cpu", "1.0").returncode == 0

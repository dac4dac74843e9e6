"""Training within a time budget: steps, learning rate, averaged weights, log and saved state."""

from __future__ import annotations

import faulthandler
import json
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train_tiny.captured import Captured, own_stream
from train_tiny.muon import Muon

SECONDS_BETWEEN_SAVES = 60.0
STEPS_BETWEEN_LOGS = 100
WARM_UP_STEPS = 300
GRADIENT_NORM = 1.0
AVERAGE_DECAY = 0.999
EVALUATED = 20
"""Batches of the final evaluation."""
LONGEST_SILENCE = 240.0
"""Longest time without progress on a GPU in seconds: encoding samples takes up to two minutes, compiling one."""
STEPS_OF_COMPILING = 20
"""First steps, in which code is compiled; the learning rate's schedule starts after them."""


class Stage(Protocol):
    """A stage of training: its module and its batches.

    Attributes:
        name: the name of its files in the run's folder.
        module: everything that is trained, including parts that are discarded afterwards.
        learning_rate: the maximum.
        inner: parts of the module whose linear layers are trained with Muon.
    """

    name: str
    module: nn.Module
    learning_rate: float
    inner: Sequence[nn.Module]

    def kind(self) -> Hashable:
        """Samples the kind of the next batch; batches of one kind have the same shapes and computation."""
        ...

    def losses(self, kind: Any) -> dict[str, Tensor]:
        """Samples a batch; ``loss`` is minimized, the others are logged. Meets the requirements of ``Captured``."""
        ...

    def after_step(self, step: int, progress: float) -> None:
        """Updates what the optimizer does not; ``progress`` runs from 0 to 1."""
        ...

    def results(self) -> dict[str, Any]:
        """Evaluates the averaged module; the results are saved with its weights and logged."""
        ...


class Log:
    """Writes JSON lines to the run's folder and to standard output."""

    def __init__(self, folder: Path, stage: str) -> None:
        self._path = folder / f"{stage}.jsonl"
        self._stage = stage

    def write(self, **values: Any) -> None:
        line = json.dumps({"stage": self._stage} | {name: _rounded(value) for name, value in values.items()})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def expect_progress(device: torch.device) -> None:
    """Ends the process, after the tracebacks of its threads, unless this is called again within ``LONGEST_SILENCE``.

    Compilation may hang without an exception (github.com/pytorch/pytorch/pull/189290 describes one way). Only on a
    GPU, as steps elsewhere may be slow.
    """
    if device.type == "cuda":
        faulthandler.dump_traceback_later(LONGEST_SILENCE, exit=True)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Returns the autocast context of training: bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def measured(losses: Callable[[], Mapping[str, Tensor]], device: torch.device) -> dict[str, float]:
    """Returns the mean losses over several batches."""
    # With gradients, as in the compiled code.
    with mixed_precision(device):
        batches = [{name: value.detach() for name, value in losses().items()} for _ in range(EVALUATED)]
    return {name: float(torch.stack([batch[name] for batch in batches]).mean()) for name in batches[0]}


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted mean of values; both have one shape."""
    return (values * weights).sum() / weights.sum()


class Average:
    """An exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.values = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Updates the average after a step; the first steps have more weight."""
        share = 1 - min(AVERAGE_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in module.parameters()], share)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Copies the average into the module."""
        torch._foreach_copy_([parameter.detach() for parameter in module.parameters()], self.values)


def rate(progress: float, step: int) -> float:
    """Returns the factor of the learning rate: a warm-up over steps, then half a cosine over time."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(progress, 1.0))))


def optimizers_of(stage: Stage, parameters: list[nn.Parameter], learning_rate: Tensor) -> list[torch.optim.Optimizer]:
    """Returns Muon for the inner linear layers, if any, and AdamW for the rest, without decay of norms and biases.

    The learning rate is a scalar on the device.
    """
    linears = [m for part in stage.inner for m in part.modules() if isinstance(m, nn.Linear)]
    inner = {id(linear.weight): linear.weight for linear in linears}
    rest = [p for p in parameters if id(p) not in inner]
    matrices, others = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    on_gpu = learning_rate.device.type == "cuda"
    adam = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.98), fused=on_gpu, capturable=on_gpu)
    return [adam, Muon(inner.values(), learning_rate)] if inner else [adam]


class Training:
    """A stage's steps so far, in its file and in memory.

    Args:
        stage: what is trained.
        file: of the stage; goes on from it where it is there. What is done already goes on from its averaged weights,
            with an optimizer and a learning rate that start anew.

    Attributes:
        step: taken in all calls.
        seconds: spent in all calls, when this one began.
        first_step: of this schedule of the learning rate.
        first_second: as ``first_step``.
        logged: names of what a step returns: the losses, the same for all kinds of batches, and the gradients' norm.
    """

    def __init__(self, stage: Stage, file: Path) -> None:
        self.stage, self._file = stage, file
        self.trained = [parameter for parameter in stage.module.parameters() if parameter.requires_grad]
        self.device = self.trained[0].device
        self._rate = torch.zeros((), device=self.device)
        self.optimizers = optimizers_of(stage, self.trained, self._rate)
        self._descend = Captured(self._descended, self.device)
        self.step = self.first_step = 0
        self.seconds = self.first_second = 0.0
        self.logged: tuple[str, ...] = ()
        saved = _saved(file, self.device)
        if saved:
            stage.module.load_state_dict(saved["weights"])
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.first_step, self.first_second = self.step, self.seconds
        self.average = Average(stage.module)
        if "optimizers" in saved:
            self.first_step, self.first_second = saved["first"]
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                # The groups' settings are this run's: the learning rate is read where it is.
                optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
                for group in optimizer.param_groups:
                    group["lr"] = self._rate
            self.average.values = saved["average"]

    def take_step(self, progress: float) -> Tensor:
        """Takes a step at ``progress`` (0 to 1); returns the ``logged`` values, which are valid until the next step."""
        stage, own = self.stage, self.step - self.first_step
        self._rate.fill_(stage.learning_rate * rate(progress, own))
        values = self._descend(stage.kind())
        stage.after_step(self.step, progress)
        self.average.update(stage.module, own)
        self.step += 1
        return values

    def _descended(self, kind: Hashable) -> Tensor:
        with mixed_precision(self.device):
            losses = self.stage.losses(kind)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.trained, GRADIENT_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.logged = (*losses, "gradient_norm")
        return torch.stack([value.detach().float() for value in (*losses.values(), norm)])

    def save(self, seconds: float) -> None:
        """Saves the state from which training can resume."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"optimizers": states, "average": self.average.values}
        self._write(seconds, state | {"first": (self.first_step, self.first_second)})

    def finish(self, seconds: float) -> dict[str, Any]:
        """Switches to the averaged weights, evaluates them, and saves both."""
        self.average.copy_to(self.stage.module)
        results = self.stage.results()
        self._write(seconds, {"done": True, "results": results})
        return results

    def _write(self, seconds: float, more: dict[str, Any]) -> None:
        save(self._file, {"weights": self.stage.module.state_dict(), "step": self.step, "seconds": seconds} | more)


def train(stage: Stage, folder: Path, minutes: float, seed: int = 0, began: float | None = None) -> None:
    """Trains ``stage`` for ``minutes`` in total, resuming an earlier call.

    Args:
        stage: the stage.
        folder: of the run.
        minutes: the budget of all calls together.
        seed: of the random numbers, together with the first step of the call.
        began: start of the call on the monotonic clock, so that preparations count; None = now.

    Writes ``NAME.pt`` to ``folder``: once done, the averaged weights (``weights``) and the stage's ``results``; before
    that, the state to resume from.

    Raises:
        SystemExit: the losses are no longer finite; another call resumes from the last saved state.
    """
    began = time.monotonic() if began is None else began
    training, log = Training(stage, folder / f"{stage.name}.pt"), Log(folder, stage.name)
    expect_progress(training.device)
    torch.manual_seed(seed + training.step)
    count = sum(parameter.numel() for parameter in training.trained)
    log.write(event="start", step=training.step, parameters=count, device=str(training.device), minutes=minutes)
    clock = began - training.seconds
    try:
        with own_stream(training.device):
            _take_steps(training, log, clock, minutes * 60)
            seconds = time.monotonic() - clock
            log.write(event="end", step=training.step, seconds=seconds, **training.finish(seconds))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _take_steps(training: Training, log: Log, clock: float, budget: float) -> None:
    # Takes steps until the budget of seconds is spent, and returns when the device has completed them.
    saved_at, sums, summed = time.monotonic() - clock, torch.zeros((), device=training.device), 0
    while (seconds := time.monotonic() - clock) < budget:
        if training.step == training.first_step + STEPS_OF_COMPILING:
            training.first_second = seconds
        sums = sums + training.take_step((seconds - training.first_second) / (budget - training.first_second))
        summed += 1
        if training.step % STEPS_BETWEEN_LOGS == 0:
            means = dict(zip(training.logged, (sums / summed).tolist(), strict=True))
            seconds = time.monotonic() - clock
            log.write(step=training.step, seconds=seconds, **means)
            expect_progress(training.device)
            if not all(map(math.isfinite, means.values())):
                raise SystemExit(f"{training.stage.name}: not finite at step {training.step}: {means}")
            sums, summed = torch.zeros_like(sums), 0
            if seconds - saved_at > SECONDS_BETWEEN_SAVES:
                saved_at = seconds
                training.save(seconds)
    if summed and not bool(sums.isfinite().all()):
        raise SystemExit(f"{training.stage.name}: not finite after step {training.step - summed}")


def seconds_of(folder: Path, name: str) -> float:
    """Returns the seconds that a stage's calls have taken so far."""
    return float(_saved(folder / f"{name}.pt", "cpu").get("seconds", 0.0))


def _saved(file: Path, device: torch.device | str) -> dict[str, Any]:
    # Empty if nothing has been saved.
    saved: dict[str, Any] = torch.load(file, map_location=device, weights_only=False) if file.exists() else {}
    return saved


def save(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a file atomically."""
    unfinished = file.with_suffix(".part")
    torch.save(dict(content), unfinished)
    unfinished.replace(file)


def finished(folder: Path, name: str) -> dict[str, Any]:
    """Returns the file of a completed stage.

    Raises:
        SystemExit: the stage is not done.
    """
    file = folder / f"{name}.pt"
    saved = _saved(file, "cpu")
    if not saved.get("done"):
        raise SystemExit(f"{file}: the stage {name} is not done; run it first")
    return saved

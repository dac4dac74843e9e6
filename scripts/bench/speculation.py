#!/usr/bin/env python3
"""Measures Jacobi decoding: tokens a step, sameness, acceptance by property, and times. Prints JSON lines.

How many guesses are right depends on the weights. For a checkpoint of your own:

    scripts/bench/speculation.py --checkpoint DIR --load-format auto

Times with shares of right guesses that are forced need no weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/speculation.py --checkpoint FULL --prompts 0 --size 1024x1024
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from ar import admit
from measure import engine_parser, parse, report
from numpy.typing import NDArray
from timing import open_benchmark_device, release, report_ceilings, synchronizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from eval.questions import Question, edit_questions, png, scene_questions
from eval.questions import Request as Picture
from glm_image.ar import engine as ar_engine
from glm_image.ar.commands import Admit, Advance, Release, Step
from glm_image.ar.config import ArConfig
from glm_image.ar.engine import AnyRun, ArEngine, ArResult
from glm_image.ar.settings import ArSettings, captured_rows
from glm_image.ar.speculation import HOST_ROW_COST, ROW_COST, WindowPolicy
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid, Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, ResolvedRequest
from train_tiny.world.draw import draw

SLOTS = 8
SIZES = [(256, 256), (256, 384), (384, 256), (192, 320), (320, 192), (320, 320), (128, 256), (256, 128)]
"""Heights and widths of the prompts' images."""
EDITS_EVERY = 4
SEED = 1000
FORCED = (0.0, 0.5, 0.8)
STEP_CASES = ((1, 16), (8, 8), (8, 16))
STEPS, BRIEF_STEPS = 50, 3
BRIEF = {"prompts": 8, "sizes": "64x64"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("speculation.py", __doc__, "256x256")
    parser.add_argument("--prompts", type=int, default=200, help="of sameness and acceptance (%(default)s)")
    parser.add_argument("--window", type=int, default=16, help="the parameter speculation_window (%(default)s)")
    parser.add_argument("--quantization", default="none", choices=("none", "int8"), help="(%(default)s)")
    parser.add_argument("--no-times", dest="times", action="store_false", help="leave out the forced guesses")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    report_ceilings(device, brief=flags.brief)
    plain = ArSettings(quantization=flags.quantization, speculation="none", max_queue=max(1, flags.prompts))
    jacobi = replace(plain, speculation="jacobi", speculation_window=flags.window)
    if flags.prompts:
        measure_prompts(checkpoint, device, (plain, jacobi), flags.prompts)
    if flags.times:
        measure_times(checkpoint, device, (plain, jacobi), flags.sizes[0], BRIEF_STEPS if flags.brief else STEPS)
    return 0


@dataclass
class Accepted:
    """How many tokens each step of a sequence accepted."""

    accepted: list[int] = field(default_factory=list)

    def guessed(self) -> NDArray[np.bool_]:
        """Returns for each token of the sequence whether it was a right guess."""
        flags = [False]  # of the prefill
        for count in self.accepted:
            flags += [False] + [True] * (count - 1)
        return np.array(flags)


class Recorder:
    """Records what steps accept, as a wrapper of the function that runs the engine's commands."""

    def __init__(self) -> None:
        self.by_seed: dict[int, Accepted] = {}
        self._slots: dict[int, Accepted] = {}

    def __call__(self, run: AnyRun) -> AnyRun:
        def recorded(command: Any) -> Any:
            result = run(command)
            if isinstance(command, Admit):
                self._slots[command.slot] = self.by_seed[command.seed] = Accepted()
            if isinstance(command, Advance):
                for step in result:
                    self._slots[step.slot].accepted.append(step.accepted)
            return result

        return recorded


@dataclass(frozen=True)
class Asked:
    """A prompt of the benchmark."""

    question: Question
    parameters: GenerationParameters


def prompts(count: int) -> list[Asked]:
    """Returns captions and, every ``EDITS_EVERY``-th, an edit, each with a seed of its own, over all sizes."""
    edits = edit_questions(count // EDITS_EVERY, SEED)
    scenes = scene_questions(count - len(edits), SEED)
    asked = []
    for index in range(count):
        is_edit = index % EDITS_EVERY == EDITS_EVERY - 1 and bool(edits)
        question = edits.pop() if is_edit else scenes.pop()
        height, width = SIZES[index // EDITS_EVERY % len(SIZES)] if is_edit else SIZES[index % len(SIZES)]
        source = question.source(Picture(height, width))
        images = None if source is None else (png(source),)
        parameters = GenerationParameters(
            prompt=question.prompt, height=height, width=width, seed=SEED + index, images=images
        )
        asked.append(Asked(question, parameters))
    return asked


def decode(
    checkpoint: Checkpoint, device: Device, settings: ArSettings, asked: Sequence[Asked], recorder: Recorder
) -> tuple[list[ArResult], list[ResolvedRequest], float]:
    """Decodes all prompts, as many together as there are slots; returns their tokens and the seconds.

    Rows cost as little as on accelerators, so that windows are as wide on the CPU, where that is slow.
    """
    with mock.patch.object(ar_engine, "HOST_ROW_COST", ROW_COST):
        engine = ArEngine(checkpoint, device, settings, watched=recorder)
    try:
        limits = Limits()
        requests = [entry.parameters.resolve(limits, engine.sampling, engine.source_rule) for entry in asked]
        started = time.perf_counter()
        futures = [engine.submit(RequestContext(), request) for request in requests]
        results = [future.result() for future in futures]
        return results, requests, time.perf_counter() - started
    finally:
        engine.close()
        release(device)


def measure_prompts(
    checkpoint: Checkpoint, device: Device, settings: tuple[ArSettings, ArSettings], count: int
) -> None:
    asked, recorder = prompts(count), Recorder()
    plain, _, plain_seconds = decode(checkpoint, device, settings[0], asked, Recorder())
    found, requests, found_seconds = decode(checkpoint, device, settings[1], asked, recorder)
    same = sum(bool((a.prior_token_ids == b.prior_token_ids).all()) for a, b in zip(plain, found, strict=True))
    report("same tokens", prompts=count, identical=same, seconds=found_seconds, to_none=found_seconds / plain_seconds)
    rates: dict[str, list[float]] = {"text to image": [], "image to image": []}
    for result in found:
        kind = "image to image" if result.source_grids else "text to image"
        tokens = result.tokens["preview"] + result.tokens["image"] - 1
        rates[kind].append(tokens / result.steps[0])
    for kind, values in rates.items():
        if values:
            low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
            report("tokens a step", kind=kind, mean=statistics.mean(values), p10=low, p50=middle, p90=high)
    report_properties(asked, found, requests, recorder)


def report_properties(
    asked: Sequence[Asked], found: Sequence[ArResult], requests: Sequence[ResolvedRequest], recorder: Recorder
) -> None:
    """Reports the share of tokens that were right guesses, by what they show."""
    shares: dict[str, list[bool]] = {}
    for entry, result, request in zip(asked, found, requests, strict=True):
        guessed = recorder.by_seed[request.seeds[0]].guessed()
        preview = result.tokens["preview"]
        shares.setdefault("preview", []).extend(guessed[:preview])
        target = guessed[preview:].reshape(request.target)
        shares.setdefault("image", []).extend(target.flatten())
        flat = _flat(result.prior_token_ids[0].reshape(request.target))
        letters = _letters(entry.question, request.target)
        masks = {"letters": letters, "flat background": flat & ~letters, "edges": ~flat & ~letters}
        for name, mask in masks.items():
            shares.setdefault(name, []).extend(target[mask])
    for name, values in shares.items():
        if values:
            report("right guesses", of=name, share=statistics.mean(map(float, values)), tokens=len(values))


def _flat(tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Returns where a token equals those to the left and above, bool [height, width]."""
    padded = np.pad(tokens, ((1, 0), (1, 0)), mode="edge")
    return (tokens == padded[1:, :-1]) & (tokens == padded[:-1, 1:])


def _letters(question: Question, grid: Grid) -> NDArray[np.bool_]:
    """Returns the tokens that a sign of the scene covers, bool [height, width]."""
    if question.scene.sign is None:
        return np.zeros(grid, bool)
    height, width = (side * PIXELS_PER_TOKEN for side in grid)
    with_sign, without = draw([question.scene, replace(question.scene, sign=None)], height, width)
    differs = (with_sign != without).any(0).reshape(grid.height, PIXELS_PER_TOKEN, grid.width, PIXELS_PER_TOKEN)
    covered: NDArray[np.bool_] = differs.any(3).any(1).numpy()
    return covered


class ForcedGuesses:
    """Makes each guess right with a given probability, from recorded tokens, before every step."""

    def __init__(self, executor: Any, tokens: Mapping[int, NDArray[np.int32]], share: float) -> None:
        self._state, self._window = executor.state, executor.jacobi.window
        slots, positions = self._state.output.shape
        self._index = torch.arange(positions, device=self._state.output.device)
        guesses, generator = torch.zeros(slots, positions, dtype=torch.int64), torch.Generator().manual_seed(0)
        for slot, row in tokens.items():
            right = torch.from_numpy(row).long()
            is_right = torch.rand(len(row), generator=generator) < share
            guesses[slot, : len(row)] = torch.where(is_right, right, (right == 0).long())
        self._guesses = guesses.to(self._state.output.device)

    @torch.inference_mode()
    def __call__(self) -> None:
        later = self._index >= self._state.sampled[:, None]
        torch.where(later, self._guesses, self._state.output, out=self._state.output)
        self._window.known.fill_(len(self._index))


def measure_times(
    checkpoint: Checkpoint, device: Device, settings: tuple[ArSettings, ArSettings], size: Size, steps: int
) -> None:
    """Times of steps and of whole sequences, against those of one-by-one decoding in the same run."""
    config, synchronize = ArConfig.read(checkpoint), synchronizer(device)
    tokens, step_seconds, sequence_seconds = _plain_times(checkpoint, device, settings[0], config, size, steps)
    engine = ArEngine(checkpoint, device, settings[1])
    engine.close_scheduler()
    executor: Any = engine.executor
    for running, width in STEP_CASES:
        for share in FORCED:
            took = _window_seconds(executor, config, size, tokens, (running, width, share), steps, synchronize)
            named = {"running": running, "rows": running * width, "right": share}
            report("step of windows", **named, ms=took * 1e3, to_none=took / step_seconds[running])
    rows = captured_rows(settings[1], is_host=device.is_host)
    for running in (1, SLOTS):
        for share in FORCED:
            policy = WindowPolicy(settings[1].speculation_window, rows, HOST_ROW_COST if device.is_host else ROW_COST)
            took, count = _sequences(executor, config, size, tokens, policy, (running, share), synchronize)
            total = len(tokens[0])
            named = {"running": running, "right": share, "tokens": total, "tokens_a_step": (total - 1) / count}
            report("sequences", **named, seconds=took, to_none=took / sequence_seconds[running])
    engine.close()
    release(device)


def _plain_times(
    checkpoint: Checkpoint, device: Device, settings: ArSettings, config: ArConfig, size: Size, steps: int
) -> tuple[dict[int, NDArray[np.int32]], dict[int, float], dict[int, float]]:
    """Returns the tokens by slot, and by number of running sequences the seconds of a step and of all steps."""
    engine, synchronize = ArEngine(checkpoint, device, settings), synchronizer(device)
    engine.close_scheduler()
    tokens, step_seconds, sequence_seconds = dict[int, NDArray[np.int32]](), dict[int, float](), dict[int, float]()
    for running in (1, SLOTS):
        total = max(admit(engine.executor, config, slot, size, seed=slot) for slot in range(running))
        synchronize()
        started = time.perf_counter()
        for _ in range(total - 1):
            engine.executor.run(Step(1))
        synchronize()
        sequence_seconds[running] = time.perf_counter() - started
        step_seconds[running] = sequence_seconds[running] / (total - 1)
        report("one-by-one decoding", running=running, ms=step_seconds[running] * 1e3, tokens=total)
        tokens |= {slot: engine.executor.run(Release(slot)) for slot in range(running)}
    engine.close()
    release(device)
    return tokens, step_seconds, sequence_seconds


def _window_seconds(
    executor: Any,
    config: ArConfig,
    size: Size,
    tokens: Mapping[int, NDArray[np.int32]],
    case: tuple[int, int, float],
    steps: int,
    synchronize: Callable[[], None],
) -> float:
    """Returns the seconds of a step with windows of one width, over the second half of the sequences."""
    running, width, share = case
    left = {slot: admit(executor, config, slot, size, seed=slot) - 1 for slot in range(running)}
    force, half, taken, started = ForcedGuesses(executor, tokens, share), left[0] // 2, 0, 0.0
    while min(left.values()) > width and taken < steps:
        if left[0] <= half:
            if not taken:
                synchronize()
                started = time.perf_counter()
            taken += 1
        force()
        for step in executor.run(Advance(tuple(dict.fromkeys(left, width).items()))):
            left[step.slot] -= step.accepted
    synchronize()
    took = time.perf_counter() - started
    for slot in left:
        executor.run(Release(slot))
    return took / taken


def _sequences(
    executor: Any,
    config: ArConfig,
    size: Size,
    tokens: Mapping[int, NDArray[np.int32]],
    policy: WindowPolicy,
    case: tuple[int, float],
    synchronize: Callable[[], None],
) -> tuple[float, int]:
    """Decodes sequences as the scheduler does; returns the seconds, and the steps of the slowest."""
    running, share = case
    left, steps = dict[int, int](), dict.fromkeys(range(running), 0)
    for slot in range(running):
        left[slot] = admit(executor, config, slot, size, seed=slot) - 1
        policy.begin(slot)
    force = ForcedGuesses(executor, tokens, share)
    synchronize()
    started = time.perf_counter()
    while left:
        force()
        for step in executor.run(Advance(tuple(policy.widths(left).items()))):
            policy.observe(step)
            left[step.slot] -= step.accepted
            steps[step.slot] += 1
        for slot in [slot for slot, tokens_left in left.items() if not tokens_left]:
            del left[slot]
            found = executor.run(Release(slot))
            if not np.array_equal(found, tokens[slot]):
                report("different tokens", running=running, slot=slot)
    synchronize()
    return time.perf_counter() - started, max(steps.values())


if __name__ == "__main__":
    sys.exit(main())

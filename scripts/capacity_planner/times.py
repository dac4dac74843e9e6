"""How long each part of a picture takes: as measured, and scaled to sizes that were not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from capacity_planner.splits import Splits, undivided
from glm_image.errors import ConfigurationError, shown
from glm_image.parallel.layout import MEMBERS
from glm_image.request import geometry
from glm_image.request.geometry import Grid, Size

DIT_WIDTH: Final = 4096
"""Channels of the published transformer: what weighs its linear layers against its attention."""

BENCH_STEPS = 50
"""Steps of the pictures that ``scripts/bench/dit.py`` paints."""

MEGAPIXEL: Final = 1024 * 1024

OWN_SUM: Final = "memory of the peers"
"""How ``scripts/bench/parallel.py`` names the exchange of a decode step that is no collective's."""


@dataclass(frozen=True)
class StageTimes:
    """Measured seconds.

    Attributes:
        source: where they come from, in words.
        step_one: a decode step with one sequence running.
        step_full: the same with ``full`` running.
        full: how many those are.
        prefill: what an admission holds up those that run.
        denoise: size -> a denoising step with guidance.
        condition: the conditions of a picture.
        vae: latents to pixels, of 1024 x 1024.
        encode: pixels to a file, of 1024 x 1024.
        overhead: of a request, beside the stages.
        int8_step: what a decode step with int8 weights takes of one with bf16.
        splits: what steps take where several cards share them.
    """

    source: str
    step_one: float
    step_full: float
    prefill: float
    denoise: Mapping[Size, float]
    condition: float
    vae: float
    full: int = 8
    encode: float = 0.0
    overhead: float = 0.0
    int8_step: float = 1.0
    splits: Splits = Splits()  # noqa: RUF009 - it cannot be changed

    def step(self, running: int) -> float:
        """Seconds of a decode step of ``running`` sequences: what one takes, and each further one more."""
        return self.step_one + (self.step_full - self.step_one) * (running - 1) / max(1, self.full - 1)

    def denoise_step(self, size: Size) -> float:
        """Seconds of a denoising step: of the nearest measured size, scaled by the arithmetic of both."""
        nearest = min(
            self.denoise, key=lambda measured: abs(measured.height * measured.width - size.height * size.width)
        )
        return self.denoise[nearest] * _flop(size) / _flop(nearest)

    def pixels(self, seconds: float, size: Size) -> float:
        """Scales seconds of 1024 x 1024 to another size."""
        return seconds * size.height * size.width / MEGAPIXEL


H100: Final = StageTimes(
    source="docs/performance.md: one and two H100 80GB HBM3, bf16, real sizes, random weights; more by Amdahl's law",
    step_one=0.00633,
    step_full=0.00641,
    prefill=0.034,
    denoise={Size(1024, 1024): 9.41 / 50, Size(1024, 1920): 19.71 / 50},
    condition=0.05,
    vae=0.19,
    overhead=0.05,
    int8_step=0.69,
    splits=Splits(
        decode=undivided(2, 1.66),
        cfg=undivided(2, 1.91),
        tp=undivided(2, 1.64),  # on two H200
        ring=undivided(2, 1.58),
        ulysses=undivided(2, 1.78),
    ),
)
"""The defaults."""


def tokens_of(size: Size) -> int:
    """Returns the image tokens of a text-to-image picture, its preview's included."""
    return sum(grid.tokens for grid in geometry.output_grids(_grid(size), image_to_image=False))


def _grid(size: Size) -> Grid:
    return geometry.target_grid(geometry.generated_size(size))


def _flop(size: Size) -> float:
    """Operations of a forward: linears and attention over four image tokens for each token of the grid."""
    tokens = 4 * _grid(size).tokens
    return 24.0 * DIT_WIDTH**2 * tokens + 4.0 * tokens**2 * DIT_WIDTH


def read_size(text: str) -> Size:
    """Reads ``WIDTHxHEIGHT``.

    Raises:
        ConfigurationError: it is none.
    """
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) * int(height)):
        raise ConfigurationError(f"size is {shown(text)}; allowed: WIDTHxHEIGHT, such as 1024x1024")
    return Size(height=int(height), width=int(width))


def read_measured(paths: list[Path], base: StageTimes = H100) -> StageTimes:
    """Replaces times by those that ``scripts/bench/ar.py``, ``dit.py``, ``served.py`` and ``parallel.py`` have printed.

    Args:
        paths: files of JSON lines; a later line counts more than an earlier one.
        base: what holds for what no line tells.

    Raises:
        ConfigurationError: a file cannot be read, or tells no time.
    """
    reader = _Reader(base)
    for path in paths:
        try:
            for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
                reader.read(json.loads(line))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path}: no JSON lines of a benchmark: {shown(str(error))}") from error
    if not reader.told:
        raise ConfigurationError(
            f"{', '.join(map(str, paths))}: no line tells a time of a stage; "
            "allowed: what scripts/bench/ar.py, dit.py, served.py or parallel.py print"
        )
    rest = "" if reader.told >= {"step", "denoise", "splits"} else f"; the rest: {base.source}"
    return replace(reader.times, source=", ".join(map(str, paths)) + rest)


class _Reader:
    """Takes lines, one after the other."""

    def __init__(self, base: StageTimes) -> None:
        self.times, self.told = base, set[str]()
        self._denoise: dict[Size, float] = {}
        self._request: Mapping[str, Any] = {}
        self._readers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "decode step": self._decode_step,
            "admission of a 64-token prompt": lambda line: self._set("prefill", prefill=line["lost_ms"] / 1e3),
            f"picture, {BENCH_STEPS} steps, guidance 1.5": self._picture,
            "denoising step": self._split_denoising_step,
            "request": self._asked,
            "stages": self._stages,
        }

    def read(self, line: Mapping[str, Any]) -> None:
        reader = self._readers.get(line.get("measure", ""))
        if reader:
            reader(line)

    def _set(self, told: str, **times: Any) -> None:
        self.times = replace(self.times, **times)
        self.told.add(told)

    def _decode_step(self, line: Mapping[str, Any]) -> None:
        if "devices" in line:
            self._split_decode_step(line)
            return
        if line["size"] != 1024:
            return
        seconds, running = line["ms"] / 1e3, line["running"]
        if running == 1:
            self._set("step", step_one=seconds, step_full=max(seconds, self.times.step_full))
        else:
            self._set("step", step_full=seconds, full=running)

    def _split_decode_step(self, line: Mapping[str, Any]) -> None:
        if line.get("through") == OWN_SUM:  # what is served where the cards can
            self._set_split("decode", line)

    def _split_denoising_step(self, line: Mapping[str, Any]) -> None:
        member, _, _ = line["parallel"].partition("=")
        if line["size"] == "1024x1024" and "," not in line["parallel"] and member in MEMBERS:
            self._set_split(member, line)

    def _set_split(self, name: str, line: Mapping[str, Any]) -> None:
        share = undivided(line["devices"], line["speedup"])
        self._set("splits", splits=replace(self.times.splits, **{name: share}))

    def _picture(self, line: Mapping[str, Any]) -> None:
        size = read_size(line["size"])
        self._denoise[size] = line["denoise_seconds"] / BENCH_STEPS
        vae = line["vae_seconds"] * MEGAPIXEL / (size.height * size.width)
        self._set("denoise", denoise=dict(self._denoise), vae=vae, condition=line["condition_seconds"])

    def _asked(self, line: Mapping[str, Any]) -> None:
        self._request = line

    def _stages(self, line: Mapping[str, Any]) -> None:
        """Of a server: only requests that came one at a time tell what a stage takes by itself."""
        if line.get("concurrency") != 1 or not self._request:
            return
        size = read_size(self._request["size"])
        scale = MEGAPIXEL / (size.height * size.width)
        step = line["decode"] / (tokens_of(size) - 1)
        ratio = self.times.step_full / self.times.step_one
        self._set("step", step_one=step, step_full=step * ratio, prefill=line["prefill"])
        self._denoise[size] = line["denoise"] / self._request["steps"]
        self._set(
            "denoise",
            denoise=dict(self._denoise),
            condition=line["condition"],
            vae=line["vae"] * scale,
            encode=line["encode"] * scale,
        )

"""Durations of the phases of an image: measured ones, and scaled to other sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from glm_image.errors import ConfigurationError, shown
from glm_image.parallel.layout import MEMBERS, ParallelLayout
from glm_image.request import geometry
from glm_image.request.geometry import Grid, Size

DIT_WIDTH: Final = 4096
"""Channels of the published transformer, which set the ratio of its linear layers to its attention."""

BENCH_STEPS = 50
"""Denoising steps of the images of ``scripts/bench/dit.py``."""

MEGAPIXEL: Final = 1024 * 1024

SOURCE_TOKENS: Final = 1024
"""Of a source image of 1024 x 1024 in the prompt."""

PEER_MEMORY: Final = "memory of the peers"
"""The exchange of a decode step without collectives, as ``scripts/bench/parallel.py`` names it."""


@dataclass(frozen=True)
class ParallelScaling:
    """The serial shares of steps over several cards, from measured speedups (Amdahl, 1967).

    ``decode`` is that of a decode step, tensor parallel; the others are those of a denoising step, by the kind of
    parallelism (``ParallelLayout``).
    """

    decode: float = 0.0
    cfg: float = 0.0
    tp: float = 0.0
    ring: float = 0.0
    ulysses: float = 0.0

    def decode_step(self, cards: int) -> float:
        """Returns the duration of a decode step over some cards, relative to one card."""
        return _relative_duration(self.decode, cards)

    def denoise_step(self, layout: ParallelLayout) -> float:
        """Returns the relative duration of a denoising step; kinds of parallelism multiply."""
        return math.prod(_relative_duration(getattr(self, kind), getattr(layout, kind)) for kind in MEMBERS)


def serial_share(cards: int, speedup: float) -> float:
    """Returns the serial share of a step that two or more cards speed up by ``speedup``."""
    return (cards / speedup - 1) / (cards - 1)


def _relative_duration(serial: float, cards: int) -> float:
    return serial + (1 - serial) / cards


@dataclass(frozen=True)
class SourceTimes:
    """Seconds that a source image of 1024 x 1024 adds to an image of that size.

    Attributes:
        step: to a denoising step with guidance.
        condition: to the conditioning.
        tower: to the first stage, by the vision tower and the quantizer.
        prefill: to the first stage, by its tokens in the prompt; from arithmetic.
    """

    step: float = 0.0
    condition: float = 0.0
    tower: float = 0.0
    prefill: float = 0.0


@dataclass(frozen=True)
class StageTimes:
    """Measured seconds.

    Attributes:
        source: their origin, for the report.
        step_one: a decode step with one running sequence.
        step_full: a decode step with ``full`` running sequences.
        prefill: of one admission, during which running sequences wait.
        denoise: a denoising step with guidance, by size.
        vae: latents to pixels, of 1024 x 1024.
        encode: pixels to a file, of 1024 x 1024.
        overhead: of a request, outside the stages.
        int8_step: a decode step with int8 weights, relative to one with bf16.
        cached_token: that a token in the cache of a running sequence adds to each decode step.
        step_tokens: in the cache of each sequence when the decode steps were measured.
        of_source: of a source image.
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
    cached_token: float = 0.0
    step_tokens: int = 0
    of_source: SourceTimes = SourceTimes()
    scaling: ParallelScaling = ParallelScaling()

    def step(self, running: int) -> float:
        """Returns the seconds of a decode step of ``running`` sequences, interpolated."""
        return self.step_one + (self.step_full - self.step_one) * (running - 1) / max(1, self.full - 1)

    def denoise_step(self, size: Size) -> float:
        """Returns the seconds of a denoising step: those of the nearest measured size, scaled by operations."""
        nearest = min(self.denoise, key=lambda measured: abs(_pixels(measured) - _pixels(size)))
        return self.denoise[nearest] * _flop(size) / _flop(nearest)

    def pixels(self, seconds: float, size: Size) -> float:
        """Scales seconds of 1024 x 1024 to another size."""
        return seconds * _pixels(size) / MEGAPIXEL


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
    scaling=ParallelScaling(
        decode=serial_share(2, 1.66),
        cfg=serial_share(2, 1.91),
        tp=serial_share(2, 1.64),  # on two H200
        ring=serial_share(2, 1.58),
        ulysses=serial_share(2, 1.78),
    ),
)


ASCEND_910B3: Final = StageTimes(
    source="modelled by scripts/bench/npu_model.py for an Ascend 910B3, bf16; tp, ring, overhead as of NVIDIA cards",
    step_one=0.01671,
    step_full=0.01671,
    prefill=0.0153,
    denoise={Size(1024, 1024): 28.49 / 50},
    condition=H100.condition,
    vae=0.21,
    overhead=H100.overhead,
    int8_step=0.623,
    scaling=replace(
        H100.scaling,
        decode=serial_share(2, 1.545),
        cfg=serial_share(2, 1.991),
        ulysses=serial_share(2, 1.715),
    ),
)


def image_tokens(size: Size) -> int:
    """Returns the image tokens of a text-to-image request, preview included."""
    return sum(grid.tokens for grid in geometry.output_grids(_grid(size), image_to_image=False))


def _pixels(size: Size) -> int:
    return size.height * size.width


def _grid(size: Size) -> Grid:
    return geometry.target_grid(geometry.generated_size(size))


def _flop(size: Size) -> float:
    """Operations of a forward pass: linears and attention over four image tokens a grid token."""
    tokens = 4 * _grid(size).tokens
    return 24.0 * DIT_WIDTH**2 * tokens + 4.0 * tokens**2 * DIT_WIDTH


def read_size(text: str) -> Size:
    """Parses ``WIDTHxHEIGHT``; raises ConfigurationError for another form."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) * int(height)):
        raise ConfigurationError(f"size is {shown(text)}; allowed: WIDTHxHEIGHT, such as 1024x1024")
    return Size(height=int(height), width=int(width))


def read_measured(paths: list[Path], base: StageTimes = H100) -> StageTimes:
    """Returns ``base`` with the times that benchmarks have printed as JSON lines; later lines override earlier ones.

    Raises:
        ConfigurationError: a file cannot be read, or no line has a time.
    """
    reader = _Reader(base)
    for path in paths:
        try:
            for line in _lines(path.read_text(encoding="utf-8")):
                reader.read(line)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path}: no JSON lines or result file of a benchmark: {shown(str(error))}"
            ) from error
    if not reader.replaced:
        raise ConfigurationError(
            f"{', '.join(map(str, paths))}: no line has the time of a stage; "
            "allowed: output or result files of scripts/bench/ar.py, dit.py, i2i.py, served.py or parallel.py"
        )
    rest = "" if reader.replaced >= {"step", "denoise", "scaling"} else f"; the rest: {base.source}"
    return replace(reader.times, source=", ".join(map(str, paths)) + rest)


def _lines(text: str) -> Iterator[Mapping[str, Any]]:
    """Yields the measures of a result file, or of what a benchmark printed."""
    with suppress(ValueError):
        whole = json.loads(text)
        if "measures" in whole:
            yield from whole["measures"]
            return
    yield from map(json.loads, filter(str.strip, text.splitlines()))


class _Reader:
    """Replaces ``times``, line by line; ``replaced`` names the groups of times that were read."""

    def __init__(self, base: StageTimes) -> None:
        self.times, self.replaced = base, set[str]()
        self._denoise: dict[Size, float] = {}
        self._request: Mapping[str, Any] = {}
        self._matmul_flop_s = 0.0

    def read(self, line: Mapping[str, Any]) -> None:
        match line.get("measure"):
            case "decode step" if "devices" in line:
                if line.get("through") == PEER_MEMORY:  # the exchange that a server uses if the cards support it
                    self._set_scaling("decode", line)
            case "decode step" if line["size"] == 1024:
                self._set_decode_step(line["running"], line["ms"] / 1e3)
                self.times = replace(self.times, step_tokens=line.get("tokens_before", 0))
            case "decode step" if line["running"] == self.times.full:
                self._set_cached_token(line)
            case "admission of a 64-token prompt":
                self._set("prefill", prefill=line["lost_ms"] / 1e3)
            case "picture, 50 steps, guidance 1.5":
                self._set_image(line)
            case "denoising step":
                member, _, _ = line["parallel"].partition("=")
                if line["size"] == "1024x1024" and "," not in line["parallel"] and member in MEMBERS:
                    self._set_scaling(member, line)
            case "request":
                self._request = line
            # Only with one request at a time are a server's seconds those of a stage alone.
            case "stages" if line.get("concurrency") == 1 and self._request:
                self._set_stages(line)
            case _:
                self._read_source(line)

    def _read_source(self, line: Mapping[str, Any]) -> None:
        match line.get("measure"):
            case "ceiling" if "matmul_tflop_s" in line:
                self._matmul_flop_s = line["matmul_tflop_s"] * 1e12
            case "floor of a step" if self._matmul_flop_s:
                # A bf16 weight has two bytes, and costs a token a multiplication and an addition.
                self._set_source(prefill=line["gigabytes"] * 1e9 * SOURCE_TOKENS / self._matmul_flop_s)
            case "step" if (line["size"], line["sources"], line["guidance"]) == ("1024x1024", 1, 1.5):
                self._set_source(step=line["added_ms"] / 1e3)
            case "condition, one source" if line["size"] == "1024x1024":
                self._set_source(condition=line["seconds"])
            case "vision tower and quantizer" if (line["size"], line["sources"]) == ("1024x1024", 1):
                self._set_source(tower=line["ms"] / 1e3)

    def _set(self, group: str, **times: Any) -> None:
        self.times = replace(self.times, **times)
        self.replaced.add(group)

    def _set_decode_step(self, running: int, seconds: float) -> None:
        if running == 1:
            self._set("step", step_one=seconds, step_full=max(seconds, self.times.step_full))
        else:
            self._set("step", step_full=seconds, full=running)

    def _set_cached_token(self, line: Mapping[str, Any]) -> None:
        further = line.get("tokens_before", 0) - self.times.step_tokens
        if further > 0:
            added = max(0.0, line["ms"] / 1e3 - self.times.step_full)
            self._set("cache", cached_token=added / further / line["running"])

    def _set_source(self, **times: float) -> None:
        self._set("source", of_source=replace(self.times.of_source, **times))

    def _set_scaling(self, name: str, line: Mapping[str, Any]) -> None:
        share = serial_share(line["devices"], line["speedup"])
        self._set("scaling", scaling=replace(self.times.scaling, **{name: share}))

    def _set_image(self, line: Mapping[str, Any]) -> None:
        size = read_size(line["size"])
        self._denoise[size] = line["denoise_seconds"] / BENCH_STEPS
        vae = line["vae_seconds"] * MEGAPIXEL / _pixels(size)
        self._set("denoise", denoise=dict(self._denoise), vae=vae, condition=line["condition_seconds"])

    def _set_stages(self, line: Mapping[str, Any]) -> None:
        size = read_size(self._request["size"])
        scale = MEGAPIXEL / _pixels(size)
        step = line["decode"] / (image_tokens(size) - 1)
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

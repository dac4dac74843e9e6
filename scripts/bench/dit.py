#!/usr/bin/env python3
"""Measures the DiT engine against the time that its arithmetic takes. Prints JSON lines.

For the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/dit.py --checkpoint FULL --size 1024x1024,1920x1024 --reference --difference --cache --profile
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from images import GUIDANCE, dit_request, grid_of, render
from measure import engine_parser, parse, report, size_name
from reference import measure_difference, measure_reference
from timing import (
    SUSTAINED_MATMUL_SECONDS,
    CommandClock,
    open_benchmark_device,
    release,
    report_ceilings,
    report_kernels,
)

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.dit.cache import CacheSettings
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import Grid, rendered_size
from glm_image.request.stages import Stage

ALWAYS = CacheSettings(residual_diff_threshold=1e9)  # skips every step that it may: 35 of 50
NEVER = CacheSettings(residual_diff_threshold=1e-9)  # compares in every step, and skips none
FEW_STEPS = 12
PROFILED_STEP = 9
"""Of ``FEW_STEPS``: a step is captured before it, and replayed in it."""

BRIEF = {"sizes": "256x256", "steps": 12}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("dit.py", __doc__)
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--reference", action="store_true", help="also measure the forward of diffusers")
    parser.add_argument("--difference", action="store_true", help="also compare the blocks with those of diffusers")
    parser.add_argument("--cache", action="store_true", help="also measure cached denoising; needs cache-dit")
    parser.add_argument("--profile", action="store_true", help="also report the kernels of a step")
    parser.add_argument(
        "--quantization", default="none", metavar="NAMES", type=read_quantizations, help="none, int8, fp8, or several"
    )
    parser.add_argument("--vae-tiling", default="off", choices=("off", "on", "auto"), help="(%(default)s)")
    return parse(parser, arguments, BRIEF)


def read_quantizations(text: str) -> list[str]:
    """Reads ``--quantization``."""
    names = text.split(",")
    if not set(names) <= {"none", "int8", "fp8"}:
        raise argparse.ArgumentTypeError(f"quantization is {text!r}; allowed: none, int8, fp8, with commas between")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    run = Run(flags, checkpoint, device, [grid_of(size) for size in flags.sizes], 0.0)
    run.rate = report_ceilings(device, brief=flags.brief, matmul_seconds=SUSTAINED_MATMUL_SECONDS).matmul
    if flags.reference:
        measure_reference(checkpoint, device, run.grids, flags.steps)
        release(device)
    if flags.difference:
        measure_difference(checkpoint, device)
        release(device)
    for quantization in flags.quantization:
        run.measure_engine(quantization)
        release(device)
    return 0


def forward_flop(config: Any, tokens: int) -> float:
    """Returns the floating-point operations of one forward over ``tokens`` tokens: linears and attention."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return float(config["num_layers"] * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width))


@dataclass
class Run:
    """One run of the benchmark.

    Attributes:
        flags: what is measured.
        checkpoint: where the models come from.
        device: where they run.
        grids: the token grid of each size.
        rate: FLOP a second of the device.
    """

    flags: argparse.Namespace
    checkpoint: Checkpoint
    device: Device
    grids: list[Grid]
    rate: float

    def engine(
        self,
        quantization: str,
        cache: CacheSettings | None = None,
        watched: Callable[[Any], Any] = lambda run: run,
    ) -> DitEngine:
        """Opens an engine that has rendered every size once."""
        settings = DitSettings(
            warmup_sizes=tuple(map(rendered_size, self.grids)),
            quantization=quantization,
            vae_tiling=self.flags.vae_tiling,
            cache=cache,
        )
        return DitEngine(self.checkpoint, self.device, settings, watched=watched)

    def measure_engine(self, quantization: str) -> None:
        """Images, the memory, and what the options name."""
        clock, started = CommandClock(self.device), time.perf_counter()
        engine = self.engine(quantization, watched=clock.wrap)
        report(
            "start to ready",
            seconds=time.perf_counter() - started,
            quantization=quantization,
            peak_gb=self.device.peak_memory() / 1e9,
        )
        exact = {grid: self.measure_image(engine, clock, grid, quantization) for grid in self.grids}
        report("memory", peak_gb=self.device.peak_memory() / 1e9, quantization=quantization)
        engine.close()
        if self.flags.profile:
            self.profile(quantization)
        if self.flags.cache:
            self.measure_cache(quantization, exact)

    def measure_image(self, engine: DitEngine, clock: CommandClock, grid: Grid, quantization: str) -> float:
        """An image of the size, its first two steps before it; returns the seconds of its steps."""
        steps, named = self.flags.steps, {"size": size_name(grid), "quantization": quantization}
        first = render(engine, dit_request(grid, 2, engine.codebook_size)).seconds
        clock.take()
        image = render(engine, dit_request(grid, steps, engine.codebook_size))
        of_step, parts = clock.take()["Step"], image.context.seconds
        floors = {}
        if quantization == "none":  # the measured rate is that of the model's dtype
            floor = steps * 2 * forward_flop(self.checkpoint.config("transformer"), grid.tokens * 4 + 4) / self.rate
            floors = {"floor_seconds": floor, "to_floor": image.denoise_seconds / floor}
        report(
            f"picture, {steps} steps, guidance {GUIDANCE}",
            **named,
            attention=engine.attention_backend,
            seconds=image.seconds,
            denoise_seconds=image.denoise_seconds,
            **floors,
            vae_seconds=parts[Stage.VAE],
            condition_seconds=parts[Stage.CONDITION],
            first_two_steps_of_the_size_seconds=first,
        )
        host, step = (statistics.median(times) for times in zip(*((s.host, s.whole) for s in of_step), strict=True))
        report("host time of a step", **named, ms=host * 1e3, step_ms=step * 1e3, share=host / step)
        return image.denoise_seconds

    def measure_cache(self, quantization: str, exact: dict[Grid, float]) -> None:
        """Images with as many cached steps as there may be, and images that compare in every step and cache none."""
        layers, steps = self.checkpoint.config("transformer")["num_layers"], self.flags.steps
        engine = self.engine(quantization, ALWAYS)
        for grid, exact_seconds in exact.items():
            render(engine, dit_request(grid, FEW_STEPS, engine.codebook_size))
            cached = render(engine, dit_request(grid, steps, engine.codebook_size))
            (skipped,) = cached.context.cached_steps
            always_run = ALWAYS.Fn_compute_blocks + ALWAYS.Bn_compute_blocks
            share = 1 - skipped / steps * (1 - always_run / layers)
            report(
                f"cached picture, {steps} steps, guidance {GUIDANCE}, every step that may be",
                size=size_name(grid),
                cached_steps=skipped,
                seconds=cached.seconds,
                denoise_seconds=cached.denoise_seconds,
                exact_denoise_seconds=exact_seconds,
                to_exact=cached.denoise_seconds / exact_seconds,
                block_work_share=share,
                to_block_work=cached.denoise_seconds / (share * exact_seconds),
            )
        engine.close()
        compared = self.few_steps(quantization, NEVER)
        plain = self.few_steps(quantization, None)
        report(
            f"cached picture, {FEW_STEPS} steps, guidance {GUIDANCE}, none cached",
            size=size_name(self.grids[0]),
            cached_steps=compared.context.cached_steps[0],
            denoise_seconds=compared.denoise_seconds,
            to_exact=compared.denoise_seconds / plain.denoise_seconds,
            identical_to_exact=bool((compared.pixels == plain.pixels).all()),
        )

    def few_steps(self, quantization: str, cache: CacheSettings | None) -> Any:
        """Renders ``FEW_STEPS`` steps of the first size with an engine of its own, the second time."""
        engine = self.engine(quantization, cache)
        request = dit_request(self.grids[0], FEW_STEPS, engine.codebook_size)
        render(engine, request)
        image = render(engine, request)
        engine.close()
        del engine
        release(self.device)
        return image

    def profile(self, quantization: str) -> None:
        """Reports the kernels of one step of the first size."""
        steps = 0

        def watched(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def profiled(command: Any) -> Any:
                nonlocal steps
                steps += type(command).__name__ == "Step"
                if type(command).__name__ != "Step" or steps != PROFILED_STEP:
                    return run(command)
                results: list[Any] = []
                report_kernels(lambda: results.append(run(command)), self.device, quantization=quantization)
                return results[0]

            return profiled

        engine = self.engine(quantization, watched=watched)
        render(engine, dit_request(self.grids[0], FEW_STEPS, engine.codebook_size), RequestContext())
        engine.close()


if __name__ == "__main__":
    sys.exit(main())

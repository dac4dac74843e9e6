#!/usr/bin/env python3
"""Measures what source images cost: the vision tower, the condition pass, a denoising step. Prints JSON lines.

For the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/i2i.py --checkpoint FULL --size 1024x1024
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from images import GUIDANCE, grid_of
from measure import engine_parser, parse, report, size_name
from PIL import Image
from timing import Ceilings, open_benchmark_device, release, report_ceilings, seconds, synchronizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from vae import load_autoencoder

from glm_image.ar.vision import Vision, patches_of
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.dit.commands import Drop, ForgetSources, Prepare, ReserveSources, Step, source_commands
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.dit.vae import Vae
from glm_image.request import source_images
from glm_image.request.geometry import Grid
from glm_image.request.limits import Limits
from glm_image.request.source_images import SourcePicture

REQUEST, PICTURE = -1, -1
NO_GUIDANCE = 1.0
IMAGE_TOKENS_PER_TOKEN = 4
STEPS = 50
STEPS_BEFORE = 5
"""Steps that are not timed: the first ones choose kernels and are captured."""

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
BRIEF = {"sizes": "64x64", "repeats": 1}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("i2i.py", __doc__)
    parser.add_argument("--repeats", type=int, default=9, help="of each figure, a median (%(default)s)")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    ceilings = report_ceilings(device, brief=flags.brief)
    grid = grid_of(flags.sizes[0])
    run = Run(checkpoint, device, grid, flags.repeats, ceilings)
    run.measure_vision()
    release(device)
    vae_encode = run.vae_encode_seconds()
    release(device)
    engine = DitEngine(checkpoint, device, DitSettings())
    forward = run.measure_steps(engine)
    run.measure_condition(engine, forward, vae_encode)
    report("memory", peak_gb=device.peak_memory() / 1e9)
    engine.close()
    return 0


def read_sources(engine: DitEngine, sources: Sequence[SourcePicture]) -> None:
    """Reads source images as those of ``REQUEST``."""
    engine.executor.run(ForgetSources(REQUEST))
    engine.executor.run(ReserveSources(REQUEST, tuple(source.grid for source in sources)))
    for command in source_commands(REQUEST, sources):
        engine.executor.run(command)


def source_of(codebook_size: int, grid: Grid, seed: int) -> SourcePicture:
    """Returns a source image of random pixels and tokens."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (grid.height * 32, grid.width * 32, 3), dtype=np.uint8)
    return SourcePicture(pixels, random.integers(0, codebook_size, grid.tokens, dtype=np.int32), grid)


def png_of(grid: Grid) -> bytes:
    """Returns a PNG of random pixels whose source grid is ``grid``."""
    buffer = io.BytesIO()
    Image.fromarray(source_of(1, grid, 0).pixels).save(buffer, "png")
    return buffer.getvalue()


@dataclass(frozen=True)
class Run:
    """One run of the benchmark; image and source images have the same grid."""

    checkpoint: Checkpoint
    device: Device
    grid: Grid
    repeats: int
    ceilings: Ceilings

    @property
    def size(self) -> str:
        """The size in pixels."""
        return size_name(self.grid)

    @property
    def transformer(self) -> dict[str, Any]:
        """The config of the transformer."""
        config: dict[str, Any] = self.checkpoint.config("transformer")
        return config

    @property
    def width(self) -> int:
        """Channels of an image token."""
        return int(self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"])

    @property
    def tokens(self) -> int:
        """Image tokens of the image, and of each source."""
        return self.grid.tokens * IMAGE_TOKENS_PER_TOKEN

    def seconds(self, work: Any, warm_ups: int = 2) -> float:
        """Returns the median time of some work on the device."""
        return seconds(work, synchronizer(self.device), self.repeats, warm_ups)

    def measure_vision(self) -> None:
        """The host's work on a source, and the vision tower with the quantizer, for one to four sources."""
        file, rule, limits, processor = (
            png_of(self.grid),
            self.checkpoint.source_rule,
            Limits(),
            self.checkpoint.image_processor,
        )
        sources = source_images.for_ar([file], limits, rule)
        scaling = seconds(lambda: source_images.for_ar([file], limits, rule), lambda: None, self.repeats)
        patching = seconds(lambda: patches_of(processor, sources), lambda: None, self.repeats)
        report("host: decode and scale for the vision tower", size=self.size, ms=scaling * 1e3)
        report("host: patches", size=self.size, ms=patching * 1e3)
        started = time.perf_counter()
        vision = Vision.load(self.checkpoint, self.device.torch_device, self.device.default_dtype)
        synchronizer(self.device)()
        report("vision tower and quantizer: start to ready", seconds=time.perf_counter() - started)
        with torch.inference_mode():
            for count in (1, 2, 4):
                patches = patches_of(processor, sources * count)
                grids = [source.grid for source in sources * count]
                took = self.seconds(lambda patches=patches, grids=grids: vision.encode(patches, grids))
                report("vision tower and quantizer", size=self.size, sources=count, ms=took * 1e3)

    def vae_encode_seconds(self) -> float:
        """Returns the time in which the VAE encodes one source."""
        vae = Vae(load_autoencoder(self.checkpoint, self.device), self.device)
        pixels = source_of(1, self.grid, 0).pixels
        with torch.inference_mode():
            return self.seconds(lambda: vae.encode(pixels))

    def measure_condition(self, engine: DitEngine, forward: float, vae_encode: float) -> None:
        """Reading one source: the VAE's encoder, and the rest, which is the pass over the blocks.

        Args:
            engine: what reads.
            forward: seconds of a denoising step without guidance: one forward of the same size.
            vae_encode: seconds of the VAE's encoder by itself.
        """
        run, source = engine.executor.run, source_of(engine.codebook_size, self.grid, 0)
        whole = self.seconds(lambda: read_sources(engine, (source,)))
        run(ForgetSources(REQUEST))
        layers, itemsize = self.transformer["num_layers"], self.device.default_dtype.itemsize
        report(
            "condition, one source",
            size=self.size,
            seconds=whole,
            vae_encode_ms=vae_encode * 1e3,
            rest_ms=(whole - vae_encode) * 1e3,
            forward_ms=forward * 1e3,
            rest_to_forward=(whole - vae_encode) / forward,
            keys_and_values_gb=2 * layers * self.tokens * self.width * itemsize / 1e9,
        )

    def step_seconds(self, engine: DitEngine, guidance: float, sources_of: int | None) -> float:
        """Returns the median time of a denoising step."""
        run, tokens = engine.executor.run, np.zeros(self.grid.tokens, dtype=np.int32)
        run(Prepare(PICTURE, (), (), tokens, self.grid, STEPS, guidance, 0, sources_of))
        took = self.seconds(lambda: run(Step(PICTURE)), warm_ups=STEPS_BEFORE)
        run(Drop(PICTURE))
        return took

    def measure_steps(self, engine: DitEngine) -> float:
        """Steps without and with sources, and what explains the difference; returns the seconds of one forward."""
        plain = {guidance: self.step_seconds(engine, guidance, None) for guidance in (NO_GUIDANCE, GUIDANCE)}
        for guidance, took in plain.items():
            report("step", size=self.size, sources=0, guidance=guidance, ms=took * 1e3)
        alone, _ = self.attention_seconds(0)
        layers = self.transformer["num_layers"]
        for count in (1, 2):
            sources = tuple(source_of(engine.codebook_size, self.grid, seed) for seed in range(count))
            read_sources(engine, sources)
            attention, concatenation = self.attention_seconds(count)
            flop = layers * 4 * self.tokens**2 * count * self.width
            added = {"attention_ms": layers * (attention - alone), "concatenation_ms": layers * concatenation}
            for guidance, without in plain.items():
                took = self.step_seconds(engine, guidance, REQUEST)
                named = {"size": self.size, "sources": count, "guidance": guidance}
                report(
                    "step",
                    **named,
                    ms=took * 1e3,
                    added_ms=(took - without) * 1e3,
                    added_to_step=took / without - 1,
                    **{name: value * 1e3 for name, value in added.items()},
                    unexplained_ms=(took - without - sum(added.values())) * 1e3,
                    added_attention_tflop=flop / 1e12,
                    added_attention_floor_ms=flop / self.ceilings.matmul * 1e3,
                )
            engine.executor.run(ForgetSources(REQUEST))
        return plain[NO_GUIDANCE]

    def attention_seconds(self, sources: int) -> tuple[float, float]:
        """Returns the time of one block's attention over an image and its sources, and of joining keys and values."""
        heads = (self.transformer["num_attention_heads"], self.transformer["attention_head_dim"])
        place, dtype = self.device.torch_device, self.device.default_dtype
        own = torch.randn(3, 1, self.tokens, *heads, device=place, dtype=dtype)
        theirs = torch.randn(2, 1, self.tokens * sources, *heads, device=place, dtype=dtype)

        def join() -> list[torch.Tensor]:
            return [torch.cat([theirs[part], own[1 + part]], dim=1) for part in (0, 1)] if sources else [*own[1:]]

        keys, values = join()

        def attend() -> object:
            with sdpa_kernel(ATTENTION, set_priority=True):
                query, *others = (part.transpose(1, 2) for part in (own[0], keys, values))
                return F.scaled_dot_product_attention(query, others[0], others[1])

        with torch.inference_mode():
            return self.seconds(attend), self.seconds(join)


if __name__ == "__main__":
    sys.exit(main())

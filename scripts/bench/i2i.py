"""Measures what source images cost at engine level: the vision tower, the condition pass, a denoising step.

Prints JSON lines. For the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/i2i.py --checkpoint FULL --size 1024x1024
"""

from __future__ import annotations

import argparse
import gc
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import arguments, say, seconds
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from glm_image.ar.vision import Vision, patches_of
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.open import instance_device, open_device
from glm_image.dit.commands import Drop, ForgetSources, Prepare, ReadSources, Step
from glm_image.dit.conditioning import SourceConditioning
from glm_image.dit.engine import DitEngine
from glm_image.dit.executor import IMAGE_TOKENS_PER_TOKEN, Executor
from glm_image.dit.settings import DitSettings
from glm_image.dit.source_kv import SourceCache
from glm_image.request import source_images
from glm_image.request.geometry import Grid
from glm_image.request.limits import Limits
from glm_image.request.source_images import SourcePicture

PROMPT = "A red fox reading a newspaper that says 'NEWS'"
REQUEST, PICTURE = -1, -1
REPEATS = 9
STEPS = 50
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
STEPS_BEFORE = 5
"""Steps before those that are timed: the first ones choose kernels and are captured."""


def file_of(grid: Grid) -> bytes:
    """Returns a PNG of random pixels whose source grid is ``grid``."""
    pixels = np.random.default_rng(0).integers(0, 256, (grid.height * 32, grid.width * 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def measure_vision(checkpoint: Checkpoint, device: Device, grid: Grid, synchronize: Callable[[], None]) -> None:
    """The host's work on a source, and the vision tower with the quantizer, for one to four sources."""
    file, rule, limits = file_of(grid), checkpoint.source_rule, Limits()
    seen = source_images.for_ar([file], limits, rule)
    host = seconds(lambda: source_images.for_ar([file], limits, rule), lambda: None, REPEATS)
    patching = seconds(lambda: patches_of(checkpoint.image_processor, seen), lambda: None, REPEATS)
    say("host: decode and scale for the vision tower", size=size_of(grid), ms=host * 1e3)
    say("host: patches", size=size_of(grid), ms=patching * 1e3)
    started = time.perf_counter()
    vision = Vision.load(checkpoint, device.torch_device, device.default_dtype)
    synchronize()
    say("vision tower and quantizer: start to ready", seconds=time.perf_counter() - started)
    with torch.inference_mode():
        for count in (1, 2, 4):
            given = patches_of(checkpoint.image_processor, seen * count)
            grids = [one.grid for one in seen * count]
            took = seconds(lambda p=given, g=grids: vision.encode(p, g), synchronize, REPEATS)
            say("vision tower and quantizer", size=size_of(grid), sources=count, ms=took * 1e3)


def picture_of(engine: DitEngine, grid: Grid, seed: int) -> SourcePicture:
    """Returns a source of random pixels and tokens."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (grid.height * 32, grid.width * 32, 3), dtype=np.uint8)
    return SourcePicture(pixels, random.integers(0, engine.codebook_size, grid.tokens, dtype=np.int32), grid)


def step_seconds(
    executor: Executor, grid: Grid, guidance: float, sources_of: int | None, synchronize: Callable[[], None]
) -> float:
    """Returns the median time of a denoising step."""
    tokens = np.zeros(grid.tokens, dtype=np.int32)
    executor.run(Prepare(PICTURE, PROMPT, "", tokens, grid, STEPS, guidance, 0, sources_of))
    took = seconds(lambda: executor.run(Step(PICTURE)), synchronize, REPEATS, warm_ups=STEPS_BEFORE)
    executor.run(Drop(PICTURE))
    return took


def pass_seconds(
    executor: Executor, source: SourceConditioning, device: Device, synchronize: Callable[[], None]
) -> float:
    """Returns the time of one source's pass over the blocks."""
    model, tokens = executor._model, source.prior.shape[1]
    cache = SourceCache(model.transformer.config, [tokens], device.torch_device, model.dtype)
    return seconds(lambda: model.read_sources([source], cache), synchronize, REPEATS)


def measure_condition(
    engine: DitEngine, device: Device, grid: Grid, forward: float, synchronize: Callable[[], None]
) -> None:
    """The VAE's encoder and the pass over the blocks, alone and together; to one exact forward of the same size."""
    executor, source = engine.executor, picture_of(engine, grid, 0)
    transformer: Any = executor._model.transformer
    tokens, dtype = grid.tokens * IMAGE_TOKENS_PER_TOKEN, transformer.proj_out.weight.dtype
    with torch.inference_mode():
        encoding = seconds(lambda: executor._vae.encode(source.pixels), synchronize, REPEATS)
        latents = executor._vae.encode(source.pixels)
        prepare = executor._conditioner.prepare_source
        preparing = seconds(lambda: prepare(latents, source.token_ids, grid), synchronize, REPEATS)
        passing = pass_seconds(executor, prepare(latents, source.token_ids, grid), device, synchronize)
    whole = seconds(lambda: executor.run(ReadSources(REQUEST, (source,))), synchronize, REPEATS)
    executor.run(ForgetSources(REQUEST))
    say(
        "condition, one source",
        size=size_of(grid),
        seconds=whole,
        vae_encode_ms=encoding * 1e3,
        prepare_ms=preparing * 1e3,
        pass_ms=passing * 1e3,
        exact_forward_ms=forward * 1e3,
        pass_to_forward=passing / forward,
        keys_and_values_gb=2 * transformer.config.num_layers * tokens * width_of(transformer) * dtype.itemsize / 1e9,
    )


def attention_seconds(
    transformer: Any, device: Device, tokens: int, source_tokens: int, synchronize: Callable[[], None]
) -> tuple[float, float]:
    """Returns the time of one block's attention over a picture and sources, and of joining their keys and values."""
    config, dtype = transformer.config, transformer.proj_out.weight.dtype
    heads = (config.num_attention_heads, config.attention_head_dim)
    with torch.inference_mode():
        own, theirs = (
            torch.randn(3, 1, count, *heads, device=device.torch_device, dtype=dtype)
            for count in (tokens, source_tokens)
        )

        def join() -> list[torch.Tensor]:
            return [torch.cat([theirs[index], own[index]], dim=1) for index in (1, 2)] if source_tokens else [*own[1:]]

        keys, values = join()

        def attend() -> object:
            with sdpa_kernel(ATTENTION, set_priority=True):
                return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (own[0], keys, values)))

        return seconds(attend, synchronize, REPEATS), seconds(join, synchronize, REPEATS)


def measure_steps(engine: DitEngine, device: Device, grid: Grid, synchronize: Callable[[], None]) -> float:
    """Steps without and with sources, and what explains the difference; returns an exact forward's seconds."""
    executor = engine.executor
    transformer: Any = executor._model.transformer
    layers, tokens = transformer.config.num_layers, grid.tokens * IMAGE_TOKENS_PER_TOKEN
    plain = {g: step_seconds(executor, grid, g, None, synchronize) for g in (1.0, 1.5)}
    for guidance, took in plain.items():
        say("step", size=size_of(grid), sources=0, guidance=guidance, ms=took * 1e3)
    alone, _ = attention_seconds(transformer, device, tokens, 0, synchronize)
    for count in (1, 2):
        executor.run(ReadSources(REQUEST, tuple(picture_of(engine, grid, seed) for seed in range(count))))
        attention, join = attention_seconds(transformer, device, tokens, tokens * count, synchronize)
        flop = layers * 4 * tokens * tokens * count * width_of(transformer)
        for guidance, without in plain.items():
            took = step_seconds(executor, grid, guidance, REQUEST, synchronize)
            explained = layers * (attention - alone + join)
            say(
                "step",
                size=size_of(grid),
                sources=count,
                guidance=guidance,
                ms=took * 1e3,
                added_ms=(took - without) * 1e3,
                added_to_step=took / without - 1,
                explained_ms=explained * 1e3,
                attention_ms=layers * (attention - alone) * 1e3,
                join_ms=layers * join * 1e3,
                extra_attention_tflop=flop / 1e12,
                attention_tflop_s=flop / max(layers * (attention - alone), 1e-9) / 1e12,
            )
        executor.run(ForgetSources(REQUEST))
    return plain[1.0]


def width_of(transformer: Any) -> int:
    """Returns the width of the image tokens."""
    width: int = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return width


def size_of(grid: Grid) -> str:
    """Returns WIDTHxHEIGHT in pixels."""
    return f"{grid.width * 32}x{grid.height * 32}"


def main(flags: argparse.Namespace) -> None:
    """Runs all measures."""
    device = open_device(instance_device(flags.device, 0))
    device.set_current()
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    width, height = map(int, flags.size.split("x"))
    grid = Grid(height // 32, width // 32)
    on_cuda = device.torch_device.type == "cuda"
    say("device", device=torch.cuda.get_device_name() if on_cuda else str(device), torch=torch.__version__)

    def synchronize() -> None:
        device.record_event().synchronize()

    measure_vision(checkpoint, device, grid, synchronize)
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
    engine = DitEngine(checkpoint, device, DitSettings())
    forward = measure_steps(engine, device, grid, synchronize)
    measure_condition(engine, device, grid, forward, synchronize)
    say("memory", peak_gb=device.peak_memory() / 1e9)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--size", default="1024x1024", help="WIDTHxHEIGHT of the picture and of each source")
    main(parser.parse_args())

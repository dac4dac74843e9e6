"""Measures the second stage at engine level, against the time its arithmetic takes.

Prints JSON lines. For the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/dit.py --checkpoint FULL --sizes 1024x1024 --reference
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import GlmImageTransformer2DModel
from measure import arguments, matmul_rate, say, say_kernels, seconds
from numpy.typing import NDArray
from quantized import say_error, say_linear_rates

from glm_image.checkpoint.checkpoint import Checkpoint, fill
from glm_image.devices.base import Device
from glm_image.devices.open import instance_device, open_device
from glm_image.dit.blocks import eager_blocks
from glm_image.dit.cache import CacheSettings
from glm_image.dit.commands import Decode, Drop, Prepare, Step
from glm_image.dit.engine import DitEngine
from glm_image.dit.quantization import quantize_blocks
from glm_image.dit.select_blocks import select_blocks
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.request import geometry
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest

STEPS = 50
GUIDANCE = 1.5
ALWAYS = CacheSettings(residual_diff_threshold=1e9)  # skips whenever it may: 35 of 50 steps
NEVER = CacheSettings(residual_diff_threshold=1e-9)  # asks in every step, and skips none
FEW_STEPS = 12
PROMPT = "A red fox reading a newspaper that says 'NEWS'"


def forward_flop(config: Any, tokens: int) -> float:
    """Returns the floating-point operations of one forward over ``tokens`` tokens: linears and attention."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return config["num_layers"] * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)


def build(checkpoint: Checkpoint, device: Device, quantization: str = "none") -> Any:
    """Loads diffusers' transformer."""
    with torch.device("meta"):
        transformer = GlmImageTransformer2DModel.from_config(checkpoint.config("transformer"))
    if quantization != "none":
        quantize_blocks(transformer, quantization, device, device.default_dtype)
    fill(transformer, checkpoint.tensors("transformer", device.torch_device, device.default_dtype))
    return transformer


def forward_arguments(transformer: Any, grid: Grid, device: Device) -> dict[str, Any]:
    """Returns the arguments of one reference forward for a picture of ``grid``."""
    place, dtype = device.torch_device, device.default_dtype
    return {
        "hidden_states": torch.randn(1, 16, grid.height * 4, grid.width * 4, device=place, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 6, transformer.config.text_embed_dim, device=place, dtype=dtype),
        "prior_token_id": torch.randint(
            0, transformer.config.prior_vq_quantizer_codebook_size, (1, grid.tokens * 4), device=place
        ),
        "prior_token_drop": torch.zeros(1, grid.tokens * 4, device=place, dtype=torch.bool),
        "timestep": torch.full((1,), 500.0, device=place),
        "target_size": torch.tensor([[grid.height * 32, grid.width * 32]], device=place, dtype=dtype),
        "crop_coords": torch.zeros(1, 2, device=place, dtype=dtype),
        "return_dict": False,
    }


def measure_reference(checkpoint: Checkpoint, device: Device, grids: list[Grid]) -> None:
    """Times of diffusers' own forward, eager and with compiled blocks, and how far ours is from it."""
    transformer = build(checkpoint, device)
    synchronize = lambda: device.record_event().synchronize()  # noqa: E731
    with torch.inference_mode():
        for grid in grids:
            given = forward_arguments(transformer, grid, device)
            took = seconds(lambda g=given: transformer(**g), synchronize)
            say("diffusers eager", size=size_of(grid), forward_ms=took * 1e3, seconds_50_steps=took * 2 * STEPS)
        for grid in grids:
            torch.compiler.reset()  # a second size would be compiled for sizes of any kind, which are slower
            transformer.compile_repeated_blocks()
            given = forward_arguments(transformer, grid, device)
            started = time.perf_counter()
            transformer(**given)
            synchronize()
            compile_seconds = time.perf_counter() - started
            took = seconds(lambda g=given: transformer(**g), synchronize)
            say(
                "diffusers compiled blocks",
                size=size_of(grid),
                forward_ms=took * 1e3,
                seconds_50_steps=took * 2 * STEPS,
                compile_seconds=compile_seconds,
            )
    torch.compiler.reset()


def measure_difference(checkpoint: Checkpoint, device: Device) -> None:
    """How far our blocks are from diffusers' own, in bf16 and against fp32, on the same inputs."""
    transformer = build(checkpoint, device)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    with torch.inference_mode():
        place, dtype = device.torch_device, device.default_dtype
        cos, sin = transformer.rope(torch.empty(1, 1, 64, 96))
        rotary = (cos.to(place), sin.to(place))
        time_embedding = torch.randn(1, transformer.config.time_embed_dim, device=place, dtype=dtype)
        sequences = [
            (
                torch.randn(1, 32 * 48, width, device=place, dtype=dtype),
                torch.randn(1, n, width, device=place, dtype=dtype),
            )
            for n in (6, 1)
        ]
        theirs = eager_blocks(transformer)(sequences, time_embedding, rotary)
        exact_of = transformer.float()
        exact = eager_blocks(exact_of)([(i.float(), t.float()) for i, t in sequences], time_embedding.float(), rotary)
        del exact_of, transformer
        gc.collect()
        torch.cuda.empty_cache()
        ours = select_blocks(build(checkpoint, device), device)(sequences, time_embedding, rotary)

    def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return max(((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in zip(a, b, strict=True))

    say(
        "difference of the blocks",
        ours_to_diffusers=apart(ours, theirs),
        ours_to_fp32=apart(ours, exact),
        diffusers_to_fp32=apart(theirs, exact),
    )


def size_of(grid: Grid) -> str:
    """Returns WIDTHxHEIGHT in pixels."""
    return f"{grid.width * 32}x{grid.height * 32}"


@dataclass(frozen=True)
class Painted:
    """A picture and what it took.

    Attributes:
        seconds: all of it.
        context: the seconds of each part, and how many steps were cached.
        pixels: uint8 [1, height, width, 3].
    """

    seconds: float
    context: RequestContext
    pixels: NDArray[np.uint8]

    @property
    def denoise_seconds(self) -> float:
        """The seconds of its steps."""
        return self.context.seconds["denoise"]


def paint(engine: DitEngine, grid: Grid, steps: int, guidance: float) -> Painted:
    """Paints one picture."""
    tokens = np.random.default_rng(0).integers(0, engine.codebook_size, (1, grid.tokens), dtype=np.int32)
    size = Size(grid.height * 32, grid.width * 32)
    request = PaintRequest(
        prompt=PROMPT,
        prior_token_ids=tokens,
        grid=grid,
        requested=size,
        seeds=(1,),
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    context = RequestContext()
    started = time.perf_counter()
    result = engine.paint(context, request, Limits()).result()
    return Painted(time.perf_counter() - started, context, result.pixels)


def measure_pictures(
    engine: DitEngine, grids: list[Grid], config: Any, rate: float, quantization: str
) -> dict[Grid, float]:
    """Whole pictures: the first of its size, and a warm one. Returns the seconds of the warm one's steps."""
    exact: dict[Grid, float] = {}
    for grid in grids:
        first = paint(engine, grid, 2, GUIDANCE).seconds
        warm = paint(engine, grid, STEPS, GUIDANCE)
        parts, exact[grid] = warm.context.seconds, warm.denoise_seconds
        floor = STEPS * 2 * forward_flop(config, grid.tokens * 4 + 4) / rate
        say(
            "picture, 50 steps, guidance 1.5",
            size=size_of(grid),
            quantization=quantization,
            attention=engine.attention_backend,
            seconds=warm.seconds,
            denoise_seconds=parts["denoise"],
            floor_seconds=floor,
            to_floor=parts["denoise"] / floor,
            vae_seconds=parts["vae"],
            condition_seconds=parts["condition"],
            first_two_steps_of_the_size_seconds=first,
        )
    return exact


def measure_cache(engine: DitEngine, exact: dict[Grid, float], layers: int) -> None:
    """Pictures with cached steps, against those without: as many skipped as may be, and none though all are asked."""
    for grid, exact_seconds in exact.items():
        engine.executor.cache = ALWAYS
        paint(engine, grid, FEW_STEPS, GUIDANCE)
        cached = paint(engine, grid, STEPS, GUIDANCE)
        (skipped,) = cached.context.cached_steps
        always_run = ALWAYS.Fn_compute_blocks + ALWAYS.Bn_compute_blocks
        share = 1 - skipped / STEPS * (1 - always_run / layers)
        say(
            "cached picture, 50 steps, guidance 1.5, skipped wherever it may be",
            size=size_of(grid),
            cached_steps=skipped,
            seconds=cached.seconds,
            denoise_seconds=cached.denoise_seconds,
            exact_denoise_seconds=exact_seconds,
            to_exact=cached.denoise_seconds / exact_seconds,
            block_work_share=share,
            to_block_work=cached.denoise_seconds / (share * exact_seconds),
        )
        engine.executor.cache = NEVER
        asked = paint(engine, grid, FEW_STEPS, GUIDANCE)
        engine.executor.cache = None
        plain = paint(engine, grid, FEW_STEPS, GUIDANCE)
        say(
            f"cached picture, {FEW_STEPS} steps, guidance 1.5, none similar enough",
            size=size_of(grid),
            cached_steps=asked.context.cached_steps[0],
            denoise_seconds=asked.denoise_seconds,
            to_exact=asked.denoise_seconds / plain.denoise_seconds,
            identical_to_exact=bool((asked.pixels == plain.pixels).all()),
        )


def measure_host(engine: DitEngine, device: Device, grid: Grid) -> None:
    """Host time of a step: what it takes to enqueue while the device is not waited for."""
    executor = engine.executor
    tokens = np.zeros(grid.tokens, dtype=np.int32)
    executor.run(Prepare(-1, PROMPT, "", tokens, grid, STEPS, GUIDANCE, 0))
    times, whole = [], []
    for _ in range(9):
        device.record_event().synchronize()
        started = time.perf_counter()
        executor.run(Step(-1))
        times.append(time.perf_counter() - started)
        device.record_event().synchronize()
        whole.append(time.perf_counter() - started)
    executor.run(Drop(-1))
    host, step = statistics.median(times), statistics.median(whole)
    say("host time of a step", size=size_of(grid), ms=host * 1e3, step_ms=step * 1e3, share=host / step)


def profile(engine: DitEngine, device: Device, grid: Grid) -> None:
    """Prints the kernels of one step."""
    executor = engine.executor
    executor.run(Prepare(-2, PROMPT, "", np.zeros(grid.tokens, dtype=np.int32), grid, STEPS, GUIDANCE, 0))
    executor.run(Step(-2))
    say_kernels(lambda: executor.run(Step(-2)), lambda: device.record_event().synchronize())
    executor.run(Decode(-2))


def ways(text: str) -> list[str]:
    """Reads ``--quantization``."""
    asked = text.split(",")
    if not set(asked) <= {"none", "int8", "fp8"}:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: none, int8, fp8, with commas between")
    return asked


def main(flags: argparse.Namespace) -> None:
    """Runs all measures."""
    device = open_device(instance_device(flags.device, 0))
    device.set_current()
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    sizes = [tuple(map(int, size.split("x"))) for size in flags.sizes.split(",")]
    grids = [Grid(height // 32, width // 32) for width, height in sizes]
    rate = matmul_rate(device.torch_device, lambda: device.record_event().synchronize())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    say("ceiling", device=name, matmul_tflop_s=rate / 1e12)
    if flags.reference:
        measure_reference(checkpoint, device, grids)
        gc.collect()
        torch.cuda.empty_cache()
    if flags.difference:
        measure_difference(checkpoint, device)
        gc.collect()
        torch.cuda.empty_cache()
    for quantization in flags.quantization:
        measure_engine(flags, checkpoint, device, grids, rate, quantization)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measure_engine(
    flags: argparse.Namespace,
    checkpoint: Checkpoint,
    device: Device,
    grids: list[Grid],
    rate: float,
    quantization: str,
) -> None:
    """Measures an engine whose blocks are in 8 bits, or not."""
    if quantization != "none" and not flags.brief:
        say_linear_rates(checkpoint.config("transformer"), grids[0].tokens * 4, device)
        with_bf16, quantize_rowwise = build(checkpoint, device), build(checkpoint, device, quantization)
        say_error(with_bf16, quantize_rowwise, device, quantization)
        del with_bf16, quantize_rowwise
        gc.collect()
        torch.cuda.empty_cache()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    settings = DitSettings(
        warmup_sizes=tuple(map(geometry.painted_size, grids)),
        quantization=quantization,
        vae_tiling=flags.vae_tiling,
    )
    started = time.perf_counter()
    engine = DitEngine(checkpoint, device, settings)
    weights = torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    say("start to ready", seconds=time.perf_counter() - started, quantization=quantization, weights_gb=weights)
    exact = measure_pictures(engine, grids, checkpoint.config("transformer"), rate, quantization)
    if flags.cache:
        measure_cache(engine, exact, checkpoint.config("transformer")["num_layers"])
    say("memory", allocated_gb=torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0)
    if not flags.brief:
        measure_host(engine, device, grids[0])
    if flags.profile:
        profile(engine, device, grids[0])


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", default="1024x1024", help="WIDTHxHEIGHT, with commas between them")
    parser.add_argument("--reference", action="store_true", help="also measure diffusers' own forward")
    parser.add_argument("--difference", action="store_true", help="also compare the blocks with diffusers' own")
    parser.add_argument("--cache", action="store_true", help="also measure cached denoising; needs cache-dit")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a step")
    parser.add_argument("--quantization", default="none", metavar="WAYS", type=ways, help="none, int8, fp8, or several")
    parser.add_argument("--brief", action="store_true", help="the pictures alone")
    parser.add_argument("--vae-tiling", default="off", choices=("off", "on", "auto"))
    main(parser.parse_args())

"""Measures the first stage at engine level, against the time its weights take to be read.

Prints JSON lines. For the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/ar.py --checkpoint FULL
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from measure import arguments, copy_bandwidth, say, seconds

from glm_image.ar.commands import Admit, Release, Step
from glm_image.ar.config import ArConfig
from glm_image.ar.engine import ArEngine
from glm_image.ar.executor import Executor
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder
from glm_image.ar.rotary import rotary_tables
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.open import instance_device, open_device
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import Grid, output_grids, text_positions
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters

PROMPT_TOKENS = 64
SEEDS = range(8)
PROFILED = 16
SAMENESS_GRIDS = (Grid(8, 8), Grid(8, 16), Grid(16, 16))


def synchronizer(device: Device) -> Any:
    """Returns what waits for all work of the device."""
    return lambda: device.record_event().synchronize()


def decoder_weights(config: ArConfig) -> int:
    """Returns how many weights one step reads: the layers' and the head's."""
    projections = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    layer = config.hidden_size * (projections + 3 * config.intermediate_size)
    return layer * config.layers + config.hidden_size * config.vision_vocab_size


def prompt_ids(config: ArConfig) -> tuple[int, ...]:
    """Returns 64 ids of text."""
    texts = config.vocab_size - config.vision_vocab_size
    return tuple(config.vision_vocab_size + index * 97 % texts for index in range(PROMPT_TOKENS))


def admit(executor: Executor, config: ArConfig, slot: int, grid: Grid, seed: int) -> int:
    """Admits a text-to-image sequence; returns its tokens."""
    grids = output_grids(grid, image_to_image=False)
    executor.run(Admit(slot, prompt_ids(config), grids, config.sampling, seed))
    return sum(one.tokens for one in grids)


def step_seconds(executor: Executor, config: ArConfig, device: Device, running: int, grid: Grid, skip: int) -> float:
    """Returns the median time of a step with ``running`` sequences that have drawn ``skip`` tokens."""
    for slot in range(running):
        admit(executor, config, slot, grid, seed=slot)
    executor.run(Step(skip))
    times = [seconds(lambda: executor.run(Step(16)), synchronizer(device), repeats=1, warm_ups=0) for _ in range(7)]
    for slot in range(running):
        executor.run(Release(slot))
    return statistics.median(times) / 16


def measure_steps(executor: Executor, config: ArConfig, device: Device, floor: float) -> None:
    """Steps with one and with eight sequences, at 1024x1024, and to the end of 2048x2048."""
    for side, running, skip in ((1024, 1, 600), (1024, 8, 600), (2048, 8, 4200)):
        took = step_seconds(executor, config, device, running, Grid(side // 32, side // 32), skip)
        say("decode step", size=side, running=running, tokens_before=skip, ms=took * 1e3, to_floor=took / floor)


def measure_host(executor: Executor, config: ArConfig, device: Device) -> None:
    """Host time of a step: what it takes to enqueue while the device is not waited for."""
    admit(executor, config, 0, Grid(32, 32), seed=0)
    synchronize = synchronizer(device)
    times = []
    for _ in range(9):
        synchronize()
        started = time.perf_counter()
        executor.run(Step(1))
        times.append(time.perf_counter() - started)
    executor.run(Release(0))
    say("host time of a step", ms=statistics.median(times) * 1e3)


def measure_admission(executor: Executor, config: ArConfig, device: Device) -> None:
    """What seven running sequences lose when an eighth joins."""
    for slot in range(7):
        admit(executor, config, slot, Grid(32, 32), seed=slot)
    times = []
    for _ in range(5):
        synchronizer(device)()
        times.append(seconds(lambda: admit(executor, config, 7, Grid(32, 32), 7), synchronizer(device), 1, 0))
        executor.run(Release(7))
    for slot in range(7):
        executor.run(Release(slot))
    say("admission of a 64-token prompt", lost_ms=statistics.median(times) * 1e3)


def measure_sameness(executor: Executor, config: ArConfig) -> None:
    """Tokens of eight seeds decoded together against each decoded alone, at three sizes."""
    for grid in SAMENESS_GRIDS:
        together, alone = [], []
        for seed in SEEDS:
            count = admit(executor, config, seed, grid, seed)
        executor.run(Step(count - 1))
        together = [executor.run(Release(slot)) for slot in SEEDS]
        for seed in SEEDS:
            slot = (3 * seed + 1) % len(SEEDS)
            executor.run(Step(admit(executor, config, slot, grid, seed) - 1))
            alone.append(executor.run(Release(slot)))
        same = sum(bool((a == b).all()) for a, b in zip(together, alone, strict=True))  # type: ignore[union-attr]
        size = f"{grid.width * 32}x{grid.height * 32}"
        say("same tokens alone and among eight", size=size, sequences=len(SEEDS), identical=same, tokens=count)


def measure_reference(checkpoint: Checkpoint, device: Device) -> None:
    """Seconds a token of transformers' ``generate``, over a sample of 64."""
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration  # noqa: PLC0415

    config = GlmImageConfig(**checkpoint.config("vision_language_encoder"))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = GlmImageForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    rotary = model.model.language_model.rotary_emb
    model.to_empty(device=device.torch_device)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    inverse, _ = rotary.compute_default_rope_parameters(config.text_config)
    rotary.inv_freq = inverse.to(device.torch_device)
    inputs = {
        "input_ids": torch.tensor([prompt_ids(ArConfig.read(checkpoint))], device=device.torch_device),
        "image_grid_thw": torch.tensor([[1, 32, 32], [1, 16, 16]], device=device.torch_device),
        "images_per_sample": torch.tensor([2], device=device.torch_device),
        "do_sample": True,
        "eos_token_id": None,
    }
    synchronize = synchronizer(device)
    model.generate(**inputs, max_new_tokens=8)
    first = seconds(lambda: model.generate(**inputs, max_new_tokens=1), synchronize, repeats=3, warm_ups=1)
    whole = seconds(lambda: model.generate(**inputs, max_new_tokens=65), synchronize, repeats=1, warm_ups=0)
    say("transformers generate", ms_a_token=(whole - first) / 64 * 1e3, sample_tokens=64)


def measure_int8_error(checkpoint: Checkpoint, config: ArConfig, device: Device) -> None:
    """Logits of one prompt with int8 weights against those with the weights they were made of."""
    place, dtype = device.torch_device, device.default_dtype
    tables = rotary_tables(config, text_positions(PROMPT_TOKENS), place, dtype)
    ids = torch.tensor(prompt_ids(config), device=place)
    logits, sizes = [], []
    for int8 in (None, device.int8_product):
        decoder = Decoder.load(config, checkpoint.tensors("vision_language_encoder", place, dtype), int8=int8)
        sizes.append(sum(tensor.nbytes for tensor in decoder.parameters()))
        logits.append(decoder.prefill(ids, *tables, KvCache(config, 1, PROMPT_TOKENS, place, dtype), 0))
        del decoder
        gc.collect()
    error = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
    say("int8 weights", logit_error=error, gigabytes_before=sizes[0] / 1e9, gigabytes_after=sizes[1] / 1e9)


def step_linears(config: ArConfig) -> list[tuple[str, int]]:
    """Returns the linears of a step in their order, and how many weights each reads."""
    heads = config.heads * config.head_dim
    layer = [
        ("qkv", (heads + 2 * config.kv_heads * config.head_dim) * config.hidden_size),
        ("out", heads * config.hidden_size),
        ("gate_up", 2 * config.intermediate_size * config.hidden_size),
        ("down", config.intermediate_size * config.hidden_size),
    ]
    return layer * config.layers + [("head", config.vision_vocab_size * config.hidden_size)]


def profile(executor: Executor, config: ArConfig, device: Device, bytes_a_weight: int) -> None:
    """Prints the kernels of one step with eight running: microseconds, and the bandwidth of the linears."""
    from torch.autograd import DeviceType  # noqa: PLC0415
    from torch.profiler import ProfilerActivity  # noqa: PLC0415
    from torch.profiler import profile as record  # noqa: PLC0415

    for slot in SEEDS:
        admit(executor, config, slot, Grid(32, 32), seed=slot)
    executor.run(Step(600))
    synchronizer(device)()
    cuda = device.torch_device.type == "cuda"
    with record(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        executor.run(Step(1))
        synchronizer(device)()
    for slot in SEEDS:
        executor.run(Release(slot))
    # A device's profile also has the calls of the host.
    ran = [event for event in recorded.events() if (event.device_type == DeviceType.CUDA) == cuda]
    events = sorted(ran, key=lambda event: event.time_range.start)
    linears = iter(step_linears(config))
    spent: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for event in events:
        name = event.name
        if name in {"_linear_kernel", "_gate_up_kernel"}:
            name, weights = next(linears, (name, 0))
            sizes[name] = weights * bytes_a_weight
        spent.setdefault(name, []).append(event.time_range.elapsed_us())
    say("step under the profiler", ms=(events[-1].time_range.end - events[0].time_range.start) / 1e3)
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:PROFILED]:
        rate = {"gb_s": sizes[name] * len(times) / sum(times) / 1e3} if name in sizes else {}
        say("kernel", name=name[:60], us=sum(times), calls=len(times), us_each=sum(times) / len(times), **rate)


def measure_engine(engine: ArEngine, floor: float) -> None:
    """One request from its arrival to its tokens, the first of the process and the second, and eight at once."""
    for which, count in (("first", 1), ("second", 1), ("eight at once", 8)):
        started = time.perf_counter()
        asked = [GenerationParameters(prompt="a red fox", height=1024, width=1024, seed=seed) for seed in range(count)]
        contexts = [RequestContext() for _ in asked]
        futures = [
            engine.submit(context, one.resolve(Limits(), engine.sampling))
            for context, one in zip(contexts, asked, strict=True)
        ]
        for future in futures:
            future.result()
        took = time.perf_counter() - started
        to_floor = took / (floor * 1280)
        parts = {f"{part}_seconds": value for part, value in contexts[0].seconds.items()}
        say("engine, 1024x1024", which=which, requests=count, seconds=took, to_floor=to_floor, **parts)


def main(flags: argparse.Namespace) -> None:
    """Runs all measures."""
    device = open_device(instance_device(flags.device, 0))
    device.set_current()
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    bandwidth = copy_bandwidth(device.torch_device, synchronizer(device))
    config = ArConfig.read(checkpoint)
    settings = ArSettings(quantization=flags.quantization)
    bytes_a_weight = 1 if flags.quantization == "int8" else device.default_dtype.itemsize
    bytes_a_step = decoder_weights(config) * bytes_a_weight
    floor = bytes_a_step / bandwidth
    say(
        "ceiling",
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        copy_tb_s=bandwidth / 1e12,
    )
    say("floor of a step", gigabytes=bytes_a_step / 1e9, ms=floor * 1e3)
    if flags.quantization == "int8":
        measure_int8_error(checkpoint, config, device)
    started = time.perf_counter()
    engine = ArEngine(checkpoint, device, settings)
    say("start to ready", seconds=time.perf_counter() - started)
    measure_engine(engine, floor)
    say("memory", allocated_gb=torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0)
    engine.close()
    executor = engine.executor
    if flags.brief:
        took = step_seconds(executor, config, device, 1, Grid(32, 32), 600)
        say("decode step", size=1024, running=1, tokens_before=600, ms=took * 1e3, to_floor=took / floor)
        measure_admission(executor, config, device)
        if flags.profile:
            profile(executor, config, device, bytes_a_weight)
        return
    measure_steps(executor, config, device, floor)
    measure_host(executor, config, device)
    measure_admission(executor, config, device)
    measure_sameness(executor, config)
    if flags.profile:
        profile(executor, config, device, bytes_a_weight)
    del engine, executor
    gc.collect()
    if flags.reference:
        torch.cuda.empty_cache()
        measure_reference(checkpoint, device)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--quantization", default="none", choices=("none", "int8"))
    parser.add_argument("--brief", action="store_true", help="stop after the engine, one step and an admission")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a step")
    parser.add_argument("--reference", action="store_true", help="also measure transformers' generate")
    main(parser.parse_args())

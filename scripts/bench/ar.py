#!/usr/bin/env python3
"""Measures the AR engine against the time in which its weights are read. Prints JSON lines.

For the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/ar.py --checkpoint FULL --profile --reference
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from measure import PROMPT, engine_parser, parse, read_sizes, report, size_name
from timing import DeviceWaits, open_benchmark_device, release, report_ceilings, seconds, synchronizer

from glm_image.ar.commands import Admit, Release, Step
from glm_image.ar.config import ArConfig
from glm_image.ar.engine import ArEngine
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder
from glm_image.ar.rotary import rotary_tables
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import Grid, Size, generated_size, output_grids, target_grid, text_positions
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters

PROMPT_TOKENS = 64
SLOTS = 8
STEPS_A_COMMAND = 16
KERNELS_REPORTED = 16
REFERENCE_TOKENS, BRIEF_REFERENCE_TOKENS = 64, 8
BRIEF_TOKENS = 32
BRIEF = {"sizes": "256x256", "same": "256x256", "repeats": 2}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("ar.py", __doc__, "1024x1024,2048x2048")
    parser.add_argument("--quantization", default="none", choices=("none", "int8"), help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of each figure that is a median (%(default)s)")
    parser.add_argument(
        "--same",
        type=read_sizes,
        default="256x256,512x256,512x512",
        metavar="WIDTHxHEIGHT[,...]",
        help="at which tokens decoded alone and together are compared (%(default)s)",
    )
    parser.add_argument("--profile", action="store_true", help="also report the kernels of a step")
    parser.add_argument("--reference", action="store_true", help="also measure generate of transformers")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    config = ArConfig.read(checkpoint)
    ceilings = report_ceilings(device, brief=flags.brief)
    bytes_a_weight = 1 if flags.quantization == "int8" else device.default_dtype.itemsize
    bytes_a_step = decoder_weights(config) * bytes_a_weight
    floor = bytes_a_step / ceilings.copy
    report("floor of a step", gigabytes=bytes_a_step / 1e9, ms=floor * 1e3)
    if flags.quantization == "int8":
        measure_int8_error(checkpoint, config, device)
    started = time.perf_counter()
    engine = ArEngine(checkpoint, device, ArSettings(quantization=flags.quantization, speculation="none"))
    report("start to ready", seconds=time.perf_counter() - started)
    measure_requests(engine, flags.sizes[0], floor)
    report("memory", peak_gb=device.peak_memory() / 1e9)
    engine.close_scheduler()  # the executor is this thread's from here on
    measure_executor(engine.executor, config, device, floor, flags)
    if flags.profile:
        profile(engine.executor, config, device, bytes_a_weight, flags.sizes[0])
    engine.close()
    del engine
    release(device)
    if flags.reference:
        measure_reference(
            checkpoint, device, flags.sizes[0], BRIEF_REFERENCE_TOKENS if flags.brief else REFERENCE_TOKENS
        )
    return 0


def measure_executor(executor: Any, config: ArConfig, device: Device, floor: float, flags: argparse.Namespace) -> None:
    """Steps, admissions and sameness, command by command."""
    measure_steps(executor, config, device, floor, flags)
    measure_host(executor, config, device, flags.sizes[0], flags.repeats)
    measure_admission(executor, config, device, flags.sizes[0], flags.repeats)
    for size in flags.same:
        measure_sameness(executor, config, size, BRIEF_TOKENS if flags.brief else None)


def decoder_weights(config: ArConfig) -> int:
    """Returns how many weights one step reads: those of the layers and of the head."""
    projections = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    layer = config.hidden_size * (projections + 3 * config.intermediate_size)
    return layer * config.layers + config.hidden_size * config.vision_vocab_size


def prompt_ids(config: ArConfig) -> tuple[int, ...]:
    """Returns ``PROMPT_TOKENS`` ids of text."""
    texts = config.vocab_size - config.vision_vocab_size
    return tuple(config.vision_vocab_size + index * 97 % texts for index in range(PROMPT_TOKENS))


def grids_of(size: Size) -> tuple[Grid, ...]:
    """Returns the grids whose tokens are sampled for an image of a size: its preview's and its own."""
    return output_grids(target_grid(generated_size(size)), image_to_image=False)


def admit(executor: Any, config: ArConfig, slot: int, size: Size, seed: int) -> int:
    """Admits a text-to-image sequence; returns its number of tokens."""
    grids = grids_of(size)
    executor.run(Admit(slot, prompt_ids(config), grids, config.sampling, seed))
    return sum(grid.tokens for grid in grids)


def step_seconds(
    executor: Any, config: ArConfig, device: Device, running: int, size: Size, tokens_before: int, repeats: int
) -> float:
    """Returns the median time of a step with ``running`` sequences that have ``tokens_before`` tokens."""
    for slot in range(running):
        admit(executor, config, slot, size, seed=slot)
    for _ in range(tokens_before // STEPS_A_COMMAND):
        executor.run(Step(STEPS_A_COMMAND))
    synchronize = synchronizer(device)
    times = [seconds(lambda: executor.run(Step(STEPS_A_COMMAND)), synchronize, 1, warm_ups=0) for _ in range(repeats)]
    for slot in range(running):
        executor.run(Release(slot))
    return statistics.median(times) / STEPS_A_COMMAND


def measure_steps(executor: Any, config: ArConfig, device: Device, floor: float, flags: argparse.Namespace) -> None:
    """Steps halfway through the first size with one sequence and with all, then near the end of the other sizes."""
    cases = [(flags.sizes[0], 1), *((size, SLOTS) for size in flags.sizes)]
    for size, running in cases:
        total = sum(grid.tokens for grid in grids_of(size))
        latest = total - 1 - STEPS_A_COMMAND * flags.repeats
        before = min(latest, total * 15 // 32) if size == flags.sizes[0] else latest
        before -= before % STEPS_A_COMMAND
        took = step_seconds(executor, config, device, running, size, before, flags.repeats)
        named = {"size": planner_size(size), "running": running, "tokens_before": before}
        report("decode step", **named, ms=took * 1e3, to_floor=took / floor)


def planner_size(size: Size) -> int | str:
    """Returns the side of a square, as the capacity planner reads it."""
    return size.width if size.width == size.height else size_name(size)


def measure_host(executor: Any, config: ArConfig, device: Device, size: Size, repeats: int) -> None:
    """The host's work in a step: its time less that in which it waits for the device."""
    admit(executor, config, 0, size, seed=0)
    waits, synchronize, host, whole = DeviceWaits(device), synchronizer(device), [], []
    for _ in range(repeats):
        synchronize()
        started, waited = time.perf_counter(), waits.seconds
        executor.run(Step(1))
        host.append(time.perf_counter() - started - (waits.seconds - waited))
        synchronize()
        whole.append(time.perf_counter() - started)
    executor.run(Release(0))
    step, of_host = statistics.median(whole), statistics.median(host)
    report("host time of a step", ms=of_host * 1e3, step_ms=step * 1e3, share=of_host / step)


def measure_admission(executor: Any, config: ArConfig, device: Device, size: Size, repeats: int) -> None:
    """The time for which seven running sequences wait when an eighth joins."""
    for slot in range(SLOTS - 1):
        admit(executor, config, slot, size, seed=slot)
    times, last = [], SLOTS - 1
    for _ in range(repeats):
        times.append(seconds(lambda: admit(executor, config, last, size, last), synchronizer(device), 1, warm_ups=0))
        executor.run(Release(last))
    for slot in range(SLOTS - 1):
        executor.run(Release(slot))
    report("admission of a 64-token prompt", lost_ms=statistics.median(times) * 1e3)


def measure_sameness(executor: Any, config: ArConfig, size: Size, most: int | None) -> None:
    """Compares the first ``most`` tokens of eight seeds decoded together with those of each alone, in another slot."""
    for seed in range(SLOTS):
        total = admit(executor, config, seed, size, seed)
    count = total if most is None else min(total, most)
    executor.run(Step(count - 1))
    together = [executor.run(Release(slot)) for slot in range(SLOTS)]
    alone = []
    for seed in range(SLOTS):
        slot = (3 * seed + 1) % SLOTS
        admit(executor, config, slot, size, seed)
        executor.run(Step(count - 1))
        alone.append(executor.run(Release(slot)))
    same = sum(bool((a == b).all()) for a, b in zip(together, alone, strict=True))
    named = {"size": size_name(size), "sequences": SLOTS, "tokens": count}
    report("same tokens alone and among eight", **named, identical=same)


def measure_reference(checkpoint: Checkpoint, device: Device, size: Size, tokens: int) -> None:
    """Seconds a token of transformers' ``generate``, over a sample of ``tokens``."""
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration  # noqa: PLC0415

    config = GlmImageConfig(**checkpoint.config("vision_language_encoder"))
    default = torch.get_default_dtype()
    torch.set_default_dtype(device.default_dtype)
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
    grids = [[1, *grid] for grid in reversed(grids_of(size))]
    inputs = {
        "input_ids": torch.tensor([prompt_ids(ArConfig.read(checkpoint))], device=device.torch_device),
        "image_grid_thw": torch.tensor(grids, device=device.torch_device),
        "images_per_sample": torch.tensor([len(grids)], device=device.torch_device),
        "do_sample": True,
        "eos_token_id": None,
    }
    synchronize = synchronizer(device)
    model.generate(**inputs, max_new_tokens=8)
    first = seconds(lambda: model.generate(**inputs, max_new_tokens=1), synchronize, repeats=3, warm_ups=1)
    whole = seconds(lambda: model.generate(**inputs, max_new_tokens=1 + tokens), synchronize, repeats=1, warm_ups=0)
    report("transformers generate", ms_a_token=(whole - first) / tokens * 1e3, sample_tokens=tokens)


def measure_int8_error(checkpoint: Checkpoint, config: ArConfig, device: Device) -> None:
    """Compares the logits of one prompt with int8 weights with those of the weights they were rounded from."""
    place, dtype = device.torch_device, device.default_dtype
    tables = rotary_tables(config, text_positions(PROMPT_TOKENS), place, dtype)
    ids = torch.tensor(prompt_ids(config), device=place)
    logits, sizes = [], []
    for int8 in (None, device.int8_product):
        decoder = Decoder.load(config, checkpoint.tensors("vision_language_encoder", place, dtype), int8=int8)
        sizes.append(sum(tensor.nbytes for tensor in decoder.parameters()))
        with torch.inference_mode():
            logits.append(decoder.prefill(ids, *tables, KvCache(config, 1, PROMPT_TOKENS, place, dtype), 0))
        del decoder
        release(device)
    error = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
    report("int8 weights", logit_error=error, gigabytes_before=sizes[0] / 1e9, gigabytes_after=sizes[1] / 1e9)


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


def profile(executor: Any, config: ArConfig, device: Device, bytes_a_weight: int, size: Size) -> None:
    """Reports the kernels of one step with all slots running: microseconds, and the bandwidth of the linears."""
    from torch.autograd.profiler_util import DeviceType  # noqa: PLC0415
    from torch.profiler import ProfilerActivity  # noqa: PLC0415
    from torch.profiler import profile as record  # noqa: PLC0415

    for slot in range(SLOTS):
        total = admit(executor, config, slot, size, seed=slot)
    executor.run(Step(total * 15 // 32))
    synchronizer(device)()
    cuda = device.torch_device.type == "cuda"
    with record(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        executor.run(Step(1))
        synchronizer(device)()
    for slot in range(SLOTS):
        executor.run(Release(slot))
    # A device's profile also has the calls of the host.
    ran = [event for event in recorded.events() if (event.device_type == DeviceType.CUDA) == cuda]
    events = sorted(ran, key=lambda event: event.time_range.start)
    linears = iter(step_linears(config))
    times_of: dict[str, list[float]] = {}
    bytes_of: dict[str, int] = {}
    for event in events:
        name = event.name
        if name in {"_linear_kernel", "_gate_up_kernel"}:
            name, weights = next(linears, (name, 0))
            bytes_of[name] = weights * bytes_a_weight
        times_of.setdefault(name, []).append(event.time_range.elapsed_us())
    report("step under the profiler", ms=(events[-1].time_range.end - events[0].time_range.start) / 1e3)
    for name, times in sorted(times_of.items(), key=lambda item: -sum(item[1]))[:KERNELS_REPORTED]:
        rate = {"gb_s": bytes_of[name] * len(times) / sum(times) / 1e3} if name in bytes_of else {}
        report("kernel", name=name[:60], us=sum(times), calls=len(times), us_each=sum(times) / len(times), **rate)


def measure_requests(engine: ArEngine, size: Size, floor: float) -> None:
    """Whole requests: the first of the process, the second, and eight together."""
    for which, count in (("first", 1), ("second", 1), ("eight together", SLOTS)):
        started = time.perf_counter()
        requests = [
            GenerationParameters(prompt=PROMPT, height=size.height, width=size.width, seed=seed).resolve(
                Limits(), engine.sampling
            )
            for seed in range(count)
        ]
        contexts = [RequestContext() for _ in requests]
        futures = [engine.submit(*pair) for pair in zip(contexts, requests, strict=True)]
        for future in futures:
            future.result()
        took = time.perf_counter() - started
        parts = {f"{stage}_seconds": value for stage, value in contexts[0].seconds.items()}
        named = {"which": which, "size": size_name(size), "requests": count}
        to_floor = took / (floor * sum(grid.tokens for grid in requests[0].grids))
        report("request of the AR engine", **named, seconds=took, to_floor=to_floor, **parts)


if __name__ == "__main__":
    sys.exit(main())

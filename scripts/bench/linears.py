#!/usr/bin/env python3
"""Sweeps the tile configurations of a decode step's linears, each alone and then in whole steps. Prints JSON lines.

Reports the best configurations of each linear with the bandwidth at which its weights are read, and the step with
them. The best ones belong into ``ar/fused/decoder.py``. Needs a CUDA GPU, or TRITON_INTERPRET=1, whose times mean
nothing:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/linears.py --checkpoint FULL --activations split
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from measure import TINY_CHECKPOINT, new_parser, parse, report
from timing import open_benchmark_device, report_ceilings, seconds, synchronizer
from torch import Tensor, nn

from glm_image.ar.config import ArConfig
from glm_image.ar.fused.decoder import FusedDecoder, weights_of
from glm_image.ar.fused.step import FusedStep
from glm_image.ar.fused.tiles import INT8_TILES, TileConfigs
from glm_image.ar.model import Decoder
from glm_image.ar.state import DecodeState
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.attention import masked_decode_attention
from glm_image.devices.base import Device
from glm_image.devices.int8_linear import AnyLinear, Int8Linear
from glm_image.kernels.int8_pairs import Int8Pairs
from glm_image.kernels.skinny_linear import TileConfig, gate_up, linear_partials, partials_buffer

SLOTS = 8
LENGTH = 664
STEP_REPEATS = 31
BYTES_READ = 600e6
"""By one replay: copies of the weights, so that the L2 cache has none of them when it is read."""

START = {"bf16": TileConfigs(), "split": INT8_TILES}
SPLIT_K = {"qkv": (1, 2, 4), "out": (2, 4), "gate_up": (1,), "down": (2, 4, 6), "head": (1,)}
REPORTED = 3


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser("linears.py", __doc__)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", default=TINY_CHECKPOINT, help="(checkpoints/tiny)")
    parser.add_argument("--load-format", default="dummy", choices=("dummy", "auto"), help="dummy: random weights")
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    parser.add_argument("--activations", default="split", choices=START, help="bf16 weights, or int8 ones (split)")
    parser.add_argument("--linears", default=",".join(SPLIT_K), help="to sweep; '' for none (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="of each figure, a median (%(default)s)")
    return parse(parser, arguments, {"linears": "", "repeats": 1})


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    if device.torch_device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        print(f"error: device is {device}; allowed: a CUDA GPU, whose kernels these are", file=sys.stderr)
        return 2
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    config = ArConfig.read(checkpoint)
    bandwidth = report_ceilings(device, brief=flags.brief).copy
    torch.manual_seed(0)
    best = START[flags.activations]
    for name, shape in shapes(config).items():
        best = replace(best, **{name: sweep_linear(name, shape, flags, device, bandwidth)})
    if device.is_host:  # Triton's interpreter multiplies no bf16 matrices
        return 0
    measure_steps(checkpoint, config, device, {flags.activations: START[flags.activations], "best of the sweep": best})
    return 0


def shapes(config: ArConfig) -> dict[str, tuple[int, int]]:
    """Returns rows and columns of each linear's weights."""
    hidden, heads = config.hidden_size, config.heads * config.head_dim
    return {
        "qkv": (heads + 2 * config.kv_heads * config.head_dim, hidden),
        "out": (hidden, heads),
        "gate_up": (2 * config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
        "head": (config.vision_vocab_size, hidden),
    }


def candidates(name: str, start: TileConfig, *, sweep: bool) -> Iterator[TileConfig]:
    """Yields the configuration in use and, in a sweep, others."""
    yield start
    if sweep:
        for n, k, stages, split_k in itertools.product((32, 64, 128), (128, 256), (3, 4, 6), SPLIT_K[name]):
            tile = replace(start, block_n=n, block_k=k, stages=stages, split_k=split_k)
            if tile != start:
                yield tile


def linear_seconds(
    name: str, linears: list[AnyLinear], x: Tensor | Int8Pairs, tile: TileConfig, device: Device, repeats: int
) -> float:
    """Returns the time of one linear, of many that follow each other in a graph."""
    n = linears[0].weight.shape[0]
    product = torch.empty(SLOTS, n // 2, device=device.torch_device, dtype=torch.bfloat16)
    parts = partials_buffer(tile, SLOTS, n, device.torch_device)

    def step() -> None:
        for linear in linears:
            if name == "gate_up":
                gate_up(x, *weights_of(linear), product, tile)
            else:
                linear_partials(x, *weights_of(linear), parts, tile)

    with torch.inference_mode():
        return seconds(device.capture(step), synchronizer(device), repeats, warm_ups=repeats // 4) / len(linears)


def sweep_linear(
    name: str, shape: tuple[int, int], flags: argparse.Namespace, device: Device, bandwidth: float
) -> TileConfig:
    """Reports the best configurations of a linear; returns the best."""
    n, k = shape
    place, activations, start = device.torch_device, flags.activations, getattr(START[flags.activations], name)
    size = n * k * (2 if activations == "bf16" else 1)
    linears: list[AnyLinear] = []
    for _ in range(max(2, int(BYTES_READ // size)) if place.type != "cpu" else 1):
        linear = nn.Linear(k, n, bias=False, device=place, dtype=torch.bfloat16)
        linears.append(linear if activations == "bf16" else Int8Linear(linear, device.int8_product))
    x: Tensor | Int8Pairs = torch.randn(SLOTS, k, device=place, dtype=torch.bfloat16)
    if activations == "split" and name != "out":
        x = Int8Pairs.of(x)  # type: ignore[arg-type]
    times: dict[TileConfig, float] = {}
    for tile in candidates(name, start, sweep=name in flags.linears.split(",")):
        try:
            times[tile] = linear_seconds(name, linears, x, tile, device, flags.repeats)
        except triton.runtime.errors.OutOfResources:  # more shared memory than there is
            continue
    ranked = sorted(times, key=times.__getitem__)
    for tile in dict.fromkeys([*ranked[:REPORTED], start]):
        took = times[tile]
        rates = {"tb_s": size / took / 1e12, "to_floor": took * bandwidth / size}
        report("linear", name=name, activations=activations, us=took * 1e6, **rates, **asdict(tile))
    return ranked[0]


def idle_state(config: ArConfig, device: Device, dtype: torch.dtype) -> DecodeState:
    """Returns slots with random caches that stay where they are in their sequences."""
    generator = torch.Generator(device.torch_device).manual_seed(1)
    state = DecodeState.idle(config, SLOTS, 2 * LENGTH, device.torch_device, dtype)
    for tensor in (state.cache.keys, state.cache.values):
        values = torch.randn(tensor.shape, generator=generator, device=device.torch_device, dtype=torch.bfloat16)
        tensor.copy_(values)
    state.cos.fill_(0.8)
    state.sin.fill_(0.6)
    state.lengths.fill_(LENGTH)
    state.tokens.copy_(torch.arange(SLOTS) * 7)
    return state


def torch_logits(decoder: Decoder, device: Device) -> Tensor:
    """Returns the logits of a step in plain torch."""
    state = idle_state(decoder.config, device, decoder.dtype)
    rows = torch.arange(SLOTS, device=device.torch_device)
    cos, sin = state.cos[rows, state.lengths], state.sin[rows, state.lengths]
    return decoder.decode(state.tokens, state.lengths, cos, sin, state.cache, masked_decode_attention)


def measure_steps(checkpoint: Checkpoint, config: ArConfig, device: Device, chosen: dict[str, TileConfigs]) -> None:
    """Whole steps with each set of configurations, and the error of their logits against fp32 with the same weights."""

    def load() -> Decoder:
        source = checkpoint.tensors("vision_language_encoder", device.torch_device, torch.bfloat16)
        return Decoder.load(config, source, int8=None if "bf16" in chosen else device.int8_product)

    with torch.inference_mode():
        exact = torch_logits(load().float(), device)
        decoder = load()
        report("step", tiles="plain torch", logit_error=error_of(torch_logits(decoder, device), exact))
        for name, tiles in chosen.items():
            state = idle_state(config, device, torch.bfloat16)
            tables = (state.cos, state.sin)
            logits = FusedDecoder(decoder, SLOTS, tiles).decode(state.tokens, state.lengths, tables, state.cache)
            error = error_of(logits, exact)
            took = seconds(device.capture(FusedStep(decoder, state, tiles)), synchronizer(device), STEP_REPEATS)
            report("step", tiles=name, ms=took * 1e3, logit_error=error)


def error_of(logits: Tensor, exact: Tensor) -> float:
    """Returns the norm of the difference over that of the exact logits."""
    return float((logits - exact).norm() / exact.norm())


if __name__ == "__main__":
    sys.exit(main())

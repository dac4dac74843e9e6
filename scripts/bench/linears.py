"""Sweeps how the linears of a decode step are cut up, one by one and then in whole steps.

Prints JSON lines: the best plans of each linear with the bandwidth at which its weights are read, and the step with
them. What is best goes into ``kernels/decoder.py``. Needs a CUDA GPU:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/linears.py --checkpoint FULL --activations split
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch
import triton
from measure import arguments, copy_bandwidth, say, seconds
from torch import Tensor, nn

from glm_image.ar.config import ArConfig
from glm_image.ar.fused.decoder import INT8_TILES, FusedDecoder, TileConfigs, weights_of
from glm_image.ar.fused.step import FusedStep
from glm_image.ar.model import Decoder
from glm_image.ar.state import DecodeState
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.attention import masked_decode_attention
from glm_image.devices.base import Device
from glm_image.devices.int8_linear import AnyLinear, Int8Linear
from glm_image.devices.open import instance_device, open_device
from glm_image.kernels.int8_pairs import Int8Pairs
from glm_image.kernels.skinny_linear import TileConfig, gate_up, linear_partials, partials_buffer

SLOTS = 8
LENGTH = 664
BYTES_READ = 600e6
"""By one replay: copies of the weights, so that none is in the L2 cache when its turn comes."""

START = {"bf16": TileConfigs(), "split": INT8_TILES}
SPLITS = {"qkv": (1, 2, 4), "out": (2, 4), "gate_up": (1,), "down": (2, 4, 6), "head": (1,)}
SHOWN = 3


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


def synchronizer(device: Device) -> Callable[[], None]:
    """Returns what waits for all work of the device."""
    return lambda: device.record_event().synchronize()


def candidates(name: str, start: TileConfig, *, sweep: bool) -> Iterator[TileConfig]:
    """Yields the plan in use and, in a sweep, others."""
    yield start
    if sweep:
        for n, k, stages, split_k in itertools.product((32, 64, 128), (128, 256), (3, 4, 6), SPLITS[name]):
            plan = replace(start, block_n=n, block_k=k, stages=stages, split_k=split_k)
            if plan != start:
                yield plan


def plan_seconds(name: str, linears: list[AnyLinear], x: Tensor | Int8Pairs, plan: TileConfig, device: Device) -> float:
    """Returns the time of one linear, of many that follow each other in a graph."""
    n = linears[0].weight.shape[0]
    product = torch.empty(SLOTS, n // 2, device=device.torch_device, dtype=torch.bfloat16)
    parts = partials_buffer(plan, SLOTS, n, device.torch_device)

    def step() -> None:
        for linear in linears:
            if name == "gate_up":
                gate_up(x, *weights_of(linear), product, plan)
            else:
                linear_partials(x, *weights_of(linear), parts, plan)

    with torch.inference_mode():
        return seconds(device.capture(step), synchronizer(device), repeats=9) / len(linears)


def sweep_linear(name: str, shape: tuple[int, int], activations: str, device: Device, *, sweep: bool) -> TileConfig:
    """Says the best plans of a linear; returns the best."""
    n, k = shape
    place = device.torch_device
    size = n * k * (2 if activations == "bf16" else 1)
    linears: list[AnyLinear] = []
    for _ in range(max(2, int(BYTES_READ // size)) if place.type != "cpu" else 1):
        linear = nn.Linear(k, n, bias=False, device=place, dtype=torch.bfloat16)
        linears.append(linear if activations == "bf16" else Int8Linear(linear, device.int8_product))
    x: Tensor | Int8Pairs = torch.randn(SLOTS, k, device=place, dtype=torch.bfloat16)
    if activations == "split" and name != "out":
        x = Int8Pairs.of(x)  # type: ignore[arg-type]
    times: dict[TileConfig, float] = {}
    for plan in candidates(name, getattr(START[activations], name), sweep=sweep):
        try:
            times[plan] = plan_seconds(name, linears, x, plan, device)
        except triton.runtime.errors.OutOfResources:  # more shared memory than there is
            continue
    ranked = sorted(times, key=times.__getitem__)
    shown = dict.fromkeys([*ranked[:SHOWN], getattr(START[activations], name)])
    for plan in shown:
        took = times[plan]
        say("linear", name=name, activations=activations, us=took * 1e6, tb_s=size / took / 1e12, **asdict(plan))
    return ranked[0]


def idle_state(config: ArConfig, device: Device, dtype: torch.dtype) -> DecodeState:
    """Returns slots with random caches that stay where they are in their sequences."""
    generator = torch.Generator(device.torch_device).manual_seed(1)
    state = DecodeState.idle(config, SLOTS, 2 * LENGTH, device.torch_device, dtype)
    for tensor in (state.cache.keys, state.cache.values):
        drawn = torch.randn(tensor.shape, generator=generator, device=device.torch_device, dtype=torch.bfloat16)
        tensor.copy_(drawn)
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


def measure_steps(checkpoint: Checkpoint, config: ArConfig, device: Device, plans: dict[str, TileConfigs]) -> None:
    """Whole steps with each set of plans, and how far their logits are from fp32 with the same weights."""

    def load() -> Decoder:
        source = checkpoint.tensors("vision_language_encoder", device.torch_device, torch.bfloat16)
        return Decoder.load(config, source, int8=None if "bf16" in plans else device.int8_product)

    with torch.inference_mode():
        exact = torch_logits(load().float(), device)
        decoder = load()
        say("step", plans="plain torch", logit_error=error_of(torch_logits(decoder, device), exact))
        for name, chosen in plans.items():
            state = idle_state(config, device, torch.bfloat16)
            tables = (state.cos, state.sin)
            logits = FusedDecoder(decoder, SLOTS, chosen).decode(state.tokens, state.lengths, tables, state.cache)
            error = error_of(logits, exact)
            took = seconds(device.capture(FusedStep(decoder, state, chosen)), synchronizer(device), repeats=31)
            say("step", plans=name, ms=took * 1e3, logit_error=error)


def error_of(logits: Tensor, exact: Tensor) -> float:
    """Returns the norm of the difference over that of the exact logits."""
    return ((logits - exact).norm() / exact.norm()).item()


def main(flags: argparse.Namespace) -> None:
    """Sweeps, then takes whole steps."""
    device = open_device(instance_device(flags.device, 0))
    device.set_current()
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    config = ArConfig.read(checkpoint)
    say("ceiling", copy_tb_s=copy_bandwidth(device.torch_device, synchronizer(device)) / 1e12)
    torch.manual_seed(0)
    best = START[flags.activations]
    for name, shape in shapes(config).items():
        sweep = not flags.no_sweep and name in flags.linears.split(",")
        best = replace(best, **{name: sweep_linear(name, shape, flags.activations, device, sweep=sweep)})
    if device.torch_device.type == "cpu":  # Triton's interpreter multiplies no bf16 matrices
        return
    plans = {flags.activations: START[flags.activations], "best of the sweep": best}
    measure_steps(checkpoint, config, device, plans)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--activations", default="split", choices=START, help="bf16: with bf16 weights; split: with int8 ones"
    )
    parser.add_argument("--linears", default=",".join(SPLITS), help="those to sweep; of the others, the plan in use")
    parser.add_argument("--no-sweep", action="store_true", help="only the plans in use")
    main(parser.parse_args())

#!/usr/bin/env python3
"""Measures 8-bit products of the DiT's blocks: their rates, and the error of the blocks. Prints JSON lines.

For the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/quantized.py --checkpoint FULL --size 1024x1024 --quantization int8,fp8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dit import read_quantizations
from images import grid_of
from measure import engine_parser, parse, report
from reference import GLYPH_TOKENS, block_inputs, load_transformer, relative_error
from timing import open_benchmark_device, release, report_ceilings, seconds, synchronizer
from torch import Tensor

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.quantization import int8_sums, quantize_rows, scaled_product
from glm_image.dit.blocks import eager_blocks
from glm_image.dit.quantization import block_linears
from glm_image.dit.select_blocks import select_blocks

BRIEF = {"sizes": "64x64"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("quantized.py", __doc__)
    parser.add_argument(
        "--quantization", default=["int8"], metavar="NAMES", type=read_quantizations, help="int8, fp8, or both (int8)"
    )
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    rate = report_ceilings(device, brief=flags.brief).matmul
    for size in flags.sizes:
        measure_products(checkpoint.config("transformer"), grid_of(size).tokens * 4, device, rate)
    for quantization in flags.quantization:
        if reason := device.unsupported_quantization_reason(quantization):
            report("difference of the blocks in 8 bits", quantization=quantization, refused=reason)
            continue
        exact, rounded = load_transformer(checkpoint, device), load_transformer(checkpoint, device, quantization)
        measure_error(exact, rounded, device, quantization)
        del exact, rounded
        release(device)
    return 0


def measure_products(config: Any, tokens: int, device: Device, rate: float) -> None:
    """Rates of the products of a block, in bf16 and in 8 bits by each function that torch has."""
    place = device.torch_device
    width = config["num_attention_heads"] * config["attention_head_dim"]
    rows = 2 * tokens + sum(GLYPH_TOKENS)
    for name, n, k in (("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)):
        left, right = (torch.randn(side, k * width, device=place, dtype=torch.bfloat16) for side in (rows, n * width))
        bias = torch.randn(n * width, device=place, dtype=torch.bfloat16)
        for function, work in products(left, right, bias, device).items():
            took = seconds(work, synchronizer(device), repeats=15, warm_ups=3)
            flop = 2 * rows * n * k * width**2
            named = {"layer": name, "function": function, "rows": rows}
            report("product", **named, ms=took * 1e3, tflop_s=flop / took / 1e12, to_floor=took * rate / flop)


def products(left: Tensor, right: Tensor, bias: Tensor, device: Device) -> dict[str, Callable[[], Tensor]]:
    """Returns the functions that compute ``left @ right.T + bias``, by name."""
    int8_left, int8_right = (quantize_rows(factor, torch.int8) for factor in (left, right))
    functions: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: torch.nn.functional.linear(left, right, bias),
        "int8, sums alone": lambda: int8_sums(int8_left.values, int8_right.values),
    }
    if device.unsupported_quantization_reason("fp8") is None:
        fp8_left, fp8_right = (quantize_rows(factor, torch.float8_e4m3fn) for factor in (left, right))
        one = torch.ones((), device=left.device)
        functions["fp8, a scale a row"] = lambda: scaled_product(fp8_left, fp8_right, bias, torch.bfloat16)
        functions["fp8, one scale"] = lambda: torch._scaled_mm(
            fp8_left.values,
            fp8_right.values.T,
            scale_a=one,
            scale_b=one,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return functions


def measure_error(exact: Any, rounded: Any, device: Device, quantization: str) -> None:
    """Compares blocks in 8 bits with those of the device's dtype, with the same weights, on the same inputs.

    Args:
        exact: a transformer in the device's dtype.
        rounded: one with quantized blocks.
        device: where both are.
        quantization: of the second.
    """
    copy_weights(exact, rounded)
    with torch.inference_mode():
        sequences, time_embedding, rotary = block_inputs(exact, device)
        unrounded = eager_blocks(exact)(sequences, time_embedding, rotary)
        reference = eager_blocks(rounded)(sequences, time_embedding, rotary)
        outputs = select_blocks(rounded, device)(sequences, time_embedding, rotary)
    report(
        "difference of the blocks in 8 bits",
        quantization=quantization,
        to_exact=relative_error(outputs, unrounded),
        to_reference=relative_error(outputs, reference),
        reference_to_exact=relative_error(reference, unrounded),
    )
    # The error of what the blocks add, not of their sum with what they read.
    images = [image for image, _ in sequences]
    added, exact_added = (
        [output - image for output, image in zip(both, images, strict=True)] for both in (outputs, unrounded)
    )
    report("difference of what the blocks add", quantization=quantization, to_exact=relative_error(added, exact_added))


def copy_weights(exact: Any, rounded: Any) -> None:
    """Gives quantized blocks the weights of others: random weights differ with the order in which they are sampled."""
    for to, source in zip(rounded.transformer_blocks, exact.transformer_blocks, strict=True):
        to.norm1.load_state_dict(source.norm1.state_dict())
        for (owner, name), (of, _) in zip(block_linears(to), block_linears(source), strict=True):
            layer, exact_layer = getattr(owner, name), getattr(of, name)
            layer.weight, layer.bias = exact_layer.weight, exact_layer.bias
            layer.filled()


if __name__ == "__main__":
    sys.exit(main())

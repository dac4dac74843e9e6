"""What ``dit.py`` measures of 8-bit products: their rates, and how far the blocks are from those of bf16."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from measure import say, seconds
from torch import Tensor

from glm_image.devices.base import Device
from glm_image.devices.quantization import int8_sums, quantize_rows, scaled_product
from glm_image.dit.blocks import eager_blocks
from glm_image.dit.quantization import block_linears
from glm_image.dit.select_blocks import select_blocks

GLYPH_TOKENS = (6, 1)


def say_linear_rates(config: Any, tokens: int, device: Device) -> None:
    """Rates of the products of a block, in bf16 and in 8 bits in the ways that torch has."""
    place = device.torch_device
    synchronize = lambda: device.record_event().synchronize()  # noqa: E731
    width = config["num_attention_heads"] * config["attention_head_dim"]
    rows = 2 * tokens + sum(GLYPH_TOKENS)
    for name, n, k in (("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)):
        left, right = (torch.randn(side, k * width, device=place, dtype=torch.bfloat16) for side in (rows, n * width))
        bias = torch.randn(n * width, device=place, dtype=torch.bfloat16)
        for way, work in ways_to_multiply(left, right, bias, device).items():
            took = seconds(work, synchronize, repeats=15, warm_ups=3)
            rate = 2 * rows * n * k * width**2 / took / 1e12
            say("product", layer=name, way=way, rows=rows, ms=took * 1e3, tflop_s=rate)


def ways_to_multiply(left: Tensor, right: Tensor, bias: Tensor, device: Device) -> dict[str, Callable[[], Tensor]]:
    """The ways to compute ``left @ right.T + bias``, by name."""
    q_left, q_right = (quantize_rows(factor, torch.int8) for factor in (left, right))
    ways: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: torch.nn.functional.linear(left, right, bias),
        "int8, sums alone": lambda: int8_sums(q_left.values, q_right.values),
    }
    if device.unsupported_quantization_reason("fp8") is None:
        f_left, f_right = (quantize_rows(factor, torch.float8_e4m3fn) for factor in (left, right))
        one = torch.ones((), device=left.device)
        ways["fp8, a scale a row"] = lambda: scaled_product(f_left, f_right, bias, torch.bfloat16)
        ways["fp8, one scale"] = lambda: torch._scaled_mm(
            f_left.values,
            f_right.values.T,
            scale_a=one,
            scale_b=one,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return ways


def say_error(exact: Any, rounded: Any, device: Device, quantization: str) -> None:
    """How far blocks in 8 bits are from those of bf16 with the same weights, on the same inputs.

    Args:
        exact: a transformer in the device's dtype.
        rounded: one with quantized blocks.
        device: where both are.
        quantization: of the second.
    """
    copy_weights(exact, rounded)
    config = exact.config
    width = config.num_attention_heads * config.attention_head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device.torch_device, dtype=device.default_dtype)

    with torch.inference_mode():
        cos, sin = exact.rope(torch.empty(1, 1, 64, 96))
        rotary = (cos.to(device.torch_device), sin.to(device.torch_device))
        sequences = [(draw(1, 32 * 48, width), draw(1, tokens, width)) for tokens in GLYPH_TOKENS]
        time = draw(1, config.time_embed_dim)
        want = eager_blocks(exact)(sequences, time, rotary)
        twin = eager_blocks(rounded)(sequences, time, rotary)
        got = select_blocks(rounded, device)(sequences, time, rotary)
        say(
            "difference of the blocks in 8 bits",
            quantization=quantization,
            to_bf16=apart(got, want),
            to_the_twin=apart(got, twin),
            twin_to_bf16=apart(twin, want),
        )
        # Of what the blocks add, not of what they were given.
        given = [image for image, _ in sequences]
        added = [[of - was for of, was in zip(those, given, strict=True)] for those in (got, want)]
        say("difference of what the blocks add", quantization=quantization, to_bf16=apart(*added))
    gc.collect()


def copy_weights(exact: Any, rounded: Any) -> None:
    """Gives quantized blocks the weights of others; random ones differ with the order in which they are drawn."""
    for ours, theirs in zip(rounded.transformer_blocks, exact.transformer_blocks, strict=True):
        ours.norm1.load_state_dict(theirs.norm1.state_dict())
        for (owner, name), (of, _) in zip(block_linears(ours), block_linears(theirs), strict=True):
            layer, source = getattr(owner, name), getattr(of, name)
            layer.weight, layer.bias = source.weight, source.bias
            layer.filled()


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative error of a sequence, by norm."""
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in zip(ours, theirs, strict=True))

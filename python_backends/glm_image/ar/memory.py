"""What the first stage allocates at load and at its largest request, worked out without allocating it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from glm_image.ar.config import ArConfig
from glm_image.ar.model import Decoder
from glm_image.ar.state import DecodeState
from glm_image.parallel.collectives import ALONE, Group

FP32_BYTES = 4
SAMPLER_COPIES = 12
"""Scores as wide as the vocabulary that are alive in the plain sampler at once, counted as fp32."""

NORM_COPIES = 5
"""fp32 copies of a norm's input that are alive in it at once, where it is not fused."""

DISTANCE_COPIES = 3
"""fp32 tables of every patch's distance to every code that are alive in the quantizer at once."""


def weight_bytes(config: ArConfig, dtype: torch.dtype, *, int8: bool = False, group: Group = ALONE) -> int:
    """Returns the memory of the decoder's weights, or of a rank's part of them.

    Args:
        config: the whole decoder's numbers.
        dtype: of the weights.
        int8: whether those of the linear layers are int8, with scales.
        group: the ranks that share it.
    """
    with torch.device("meta"):
        decoder = Decoder(config, group)
    size = sum(weight.numel() for weight in decoder.parameters()) * dtype.itemsize
    if int8:
        for linear in (module for module in decoder.modules() if isinstance(module, nn.Linear)):
            size += linear.weight.numel() * (torch.int8.itemsize - dtype.itemsize) + linear.out_features * FP32_BYTES
    return size


def state_bytes(config: ArConfig, slots: int, positions: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the memory of what a decode step reads and writes, by what it is for."""
    state = DecodeState.idle(config, slots, positions, torch.device("meta"), dtype)
    cache = sum(tensor.nbytes for tensor in _tensors(state.cache))
    tables = state.cos.nbytes + state.sin.nbytes
    noise = state.noise.nbytes
    every = sum(tensor.nbytes for tensor in _tensors(state))
    return {
        f"{slots} x {positions} cached tokens": cache,
        "rotary tables": tables,
        "noise": noise,
        "tokens and sampling": every - cache - tables - noise,
    }


def activation_bytes(config: ArConfig, slots: int, positions: int, dtype: torch.dtype, *, int8: bool = False) -> int:
    """Returns the most that is alive at once of what is computed on the way.

    It is at its highest in the MLP of the longest prompt, or in the quantizer, where a prompt is all source image.
    """
    hidden, inner, queries = config.hidden_size, config.intermediate_size, config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    attention = (queries + 2 * keys) + (queries + keys) + queries  # as they come, turned, and what was attended to
    # Gate and up, then the activated gate and its product, or the norm of the outcome.
    token = (2 * hidden + attention + 2 * inner) * dtype.itemsize
    token += max(2 * inner * dtype.itemsize, NORM_COPIES * hidden * FP32_BYTES)
    prompt = positions * token
    if int8:  # the widest matrix in the activations' dtype, and a product before its scale
        prompt += (hidden + positions) * 2 * inner * dtype.itemsize
    quantizer = positions * config.codebook_size * FP32_BYTES * DISTANCE_COPIES
    sampler = slots * config.vision_vocab_size * FP32_BYTES * SAMPLER_COPIES
    return max(prompt, quantizer) + sampler


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from _tensors(part)

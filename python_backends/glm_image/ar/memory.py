"""What the first stage allocates at load and at its largest request, worked out without allocating it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glm_image.ar.config import ArConfig
from glm_image.ar.model import Decoder
from glm_image.ar.state import DecodeState

FP32_BYTES = 4
SAMPLER_COPIES = 12
"""Scores as wide as the vocabulary that are alive in the plain sampler at once, counted as fp32."""

DISTANCE_COPIES = 3
"""fp32 tables of every patch's distance to every code that are alive in the quantizer at once."""


def weight_bytes(config: ArConfig, dtype: torch.dtype) -> int:
    """Returns the memory of the decoder's weights."""
    with torch.device("meta"):
        decoder = Decoder(config)
    return sum(weight.numel() for weight in decoder.parameters()) * dtype.itemsize


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


def activation_bytes(config: ArConfig, slots: int, positions: int, dtype: torch.dtype) -> int:
    """Returns the most that is alive between two layers' worth of kernels.

    It is at its highest in the MLP of the longest prompt: the residual stream and its norm; gate and up, the activated
    gate, and their product. Or in the quantizer, where all of a prompt is one source image.
    """
    prompt = positions * (2 * config.hidden_size + 4 * config.intermediate_size) * dtype.itemsize
    quantizer = positions * config.codebook_size * FP32_BYTES * DISTANCE_COPIES
    sampler = slots * config.vision_vocab_size * FP32_BYTES * SAMPLER_COPIES
    return max(prompt, quantizer) + sampler


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from _tensors(part)

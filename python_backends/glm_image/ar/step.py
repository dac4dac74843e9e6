"""The decode step in PyTorch, for the CPU and as the reference of ``ar.fused.step``; selection of the steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm_image.ar.config import NOISE_BLOCK
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder
from glm_image.ar.sampler import sample
from glm_image.ar.state import DecodeState
from glm_image.devices.base import Device

Prefill = Callable[[Tensor, Tensor, Tensor, KvCache, int], Tensor]
"""``Decoder.prefill`` or a faster equivalent."""


class TorchStep:
    """Feeds every slot its last token and samples the next; never waits for the device."""

    def __init__(self, decoder: Decoder, state: DecodeState, device: Device) -> None:
        self._decoder = decoder
        self._state = state
        self._attention = device.decode_attention
        self._rows = torch.arange(len(state.tokens), device=device.torch_device)

    def __call__(self) -> None:
        state, rows = self._state, self._rows
        cos, sin = state.cos[rows, state.lengths], state.sin[rows, state.lengths]
        logits = self._decoder.decode(state.tokens, state.lengths, cos, sin, state.cache, self._attention)
        allowed = state.allowed[(state.sampled >= state.sampler.preview_tokens).long()]
        noise = state.noise[rows, state.sampled % NOISE_BLOCK]
        state.tokens.copy_(sample(logits, noise, state.sampler, allowed))
        state.advance(rows)


def select_steps(decoder: Decoder, state: DecodeState, device: Device) -> tuple[Callable[[], None], Prefill]:
    """Returns the fastest decode step and prefill of a device."""
    if device.has_npu_operators:
        from glm_image.ar.fused import npu  # noqa: PLC0415 - its operators are only where torch_npu is

        if npu.supports(decoder):
            return npu.npu_steps(decoder, state)
    if not device.runs_triton:
        return TorchStep(decoder, state, device), decoder.prefill
    from glm_image.ar.fused.decoder import supports  # noqa: PLC0415 - Triton is only where it can run
    from glm_image.ar.fused.prefill import FusedPrefill  # noqa: PLC0415
    from glm_image.ar.fused.step import FusedStep  # noqa: PLC0415

    fused = supports(decoder, len(state.tokens))
    step = FusedStep(decoder, state) if fused else TorchStep(decoder, state, device)
    return step, FusedPrefill(decoder) if supports(decoder, slots=1) else decoder.prefill

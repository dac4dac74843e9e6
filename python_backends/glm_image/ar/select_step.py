"""Selects the fastest decode step and prefill of a device."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder
from glm_image.ar.state import DecodeState
from glm_image.ar.step import TorchStep
from glm_image.devices.base import Device

Prefill = Callable[[Tensor, Tensor, Tensor, KvCache, int], Tensor]
"""``Decoder.prefill`` or a faster equivalent."""


def select_decode_step(decoder: Decoder, state: DecodeState, device: Device) -> Callable[[], None]:
    """Returns the decode step for a decoder and the state of its slots."""
    if device.runs_triton:
        from glm_image.ar.fused.decoder import supports  # noqa: PLC0415 - Triton is only where it can run
        from glm_image.ar.fused.step import FusedStep  # noqa: PLC0415

        if supports(decoder, len(state.tokens)):
            return FusedStep(decoder, state)
    return TorchStep(decoder, state, device)


def select_prefill(decoder: Decoder, device: Device) -> Prefill:
    """Returns the prefill for a decoder."""
    if device.runs_triton:
        from glm_image.ar.fused.decoder import supports  # noqa: PLC0415 - Triton is only where it can run
        from glm_image.ar.fused.prefill import FusedPrefill  # noqa: PLC0415

        if supports(decoder, slots=1):
            return FusedPrefill(decoder)
    return decoder.prefill

"""The decode step in PyTorch, for the CPU and as the reference of ``ar.fused.step``; selection of the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm_image.ar.config import NOISE_BLOCK
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder
from glm_image.ar.sampler import sample
from glm_image.ar.state import DecodeState
from glm_image.ar.window import Window
from glm_image.ar.window_step import TorchWindowStep
from glm_image.devices.base import Device

Prefill = Callable[[Tensor, Tensor, Tensor, KvCache, int], Tensor]
"""``Decoder.prefill`` or a faster equivalent."""


class TorchStep:
    """Feeds every slot its last token and samples the next; never waits for the device.

    Where a device needs more rows than there are slots, the others repeat the last slot's token at the last position,
    which no row reads.
    """

    def __init__(self, decoder: Decoder, state: DecodeState, device: Device) -> None:
        self._decoder = decoder
        self._state = state
        self._device = device
        slots = len(state.tokens)
        rows = torch.arange(device.step_rows(slots), device=device.torch_device)
        self._rows, self._has_slot = rows[:slots], rows < slots
        self._slot_of_row = rows.clamp(max=slots - 1)
        self._is_padded = len(rows) > slots

    def __call__(self) -> None:
        state, rows = self._state, self._rows
        logits = self._decode_padded() if self._is_padded else self._decode()
        allowed = state.allowed[(state.sampled >= state.sampler.preview_tokens).long()]
        noise = state.noise[rows, state.sampled % NOISE_BLOCK]
        state.tokens.copy_(sample(logits, noise, state.sampler, allowed))
        state.advance(rows)

    def _decode(self) -> Tensor:
        state, rows = self._state, self._rows

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self._device.decode_attention(query, keys, values, state.lengths + 1)

        cos, sin = state.cos[rows, state.lengths], state.sin[rows, state.lengths]
        return self._decoder.decode(state.tokens, rows, state.lengths, cos, sin, state.cache, attention)

    def _decode_padded(self) -> Tensor:
        state, slots = self._state, self._slot_of_row
        lengths = torch.where(self._has_slot, state.lengths[slots], state.output.shape[1] - 1)
        seen = torch.where(self._has_slot, lengths + 1, 0)

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self._device.window_attention(query, keys, values, slots, seen)

        cos, sin = state.cos[slots, lengths], state.sin[slots, lengths]
        logits = self._decoder.decode(state.tokens[slots], slots, lengths, cos, sin, state.cache, attention)
        return logits[: len(state.tokens)]


@dataclass(frozen=True)
class Steps:
    """The fastest steps of a device.

    Attributes:
        plain: makes the step that adds a token to every slot.
        windows: makes the step of Jacobi decoding with a number of rows.
    """

    plain: Callable[[], Callable[[], None]]
    windows: Callable[[Window, int], Callable[[], None]]
    prefill: Prefill


def select_steps(decoder: Decoder, state: DecodeState, device: Device) -> Steps:
    """Returns the fastest decode steps and prefill of a device."""
    if device.has_npu_operators:
        from glm_image.ar.fused import npu  # noqa: PLC0415 - its operators are only where torch_npu is

        if npu.supports(decoder):
            fused = npu.NpuDecoder(decoder)
            return Steps(
                lambda: npu.NpuStep(fused, state),
                lambda window, rows: npu.NpuWindowStep(fused, state, window, rows),
                npu.NpuPrefill(fused, device.torch_device),
            )
    steps = Steps(
        lambda: TorchStep(decoder, state, device),
        lambda window, rows: TorchWindowStep(decoder, state, window, device, rows),
        decoder.prefill,
    )
    if not device.runs_triton:
        return steps
    from glm_image.ar.fused.decoder import supports  # noqa: PLC0415 - Triton is only where it can run
    from glm_image.ar.fused.prefill import FusedPrefill  # noqa: PLC0415
    from glm_image.ar.fused.step import FusedStep  # noqa: PLC0415
    from glm_image.ar.fused.window import FusedWindowStep  # noqa: PLC0415

    if supports(decoder, slots=1):
        steps = replace(steps, prefill=FusedPrefill(decoder))
    if supports(decoder, len(state.tokens)):
        # Both or neither: they must have the same bits.
        steps = replace(
            steps,
            plain=lambda: FusedStep(decoder, state),
            windows=lambda window, rows: FusedWindowStep(decoder, state, window, rows),
        )
    return steps

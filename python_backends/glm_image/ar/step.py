"""One decode step of all slots in plain torch: the step of the CPU, and the reference of ``ar.fused.step``."""

from __future__ import annotations

import torch

from glm_image.ar.config import NOISE_BLOCK
from glm_image.ar.model import Decoder
from glm_image.ar.sampler import sample
from glm_image.ar.state import DecodeState
from glm_image.devices.base import Device


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

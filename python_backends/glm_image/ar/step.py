"""One decode step of all slots in plain torch: what the CPU runs, and the twin of ``kernels.step``."""

from __future__ import annotations

import torch

from glm_image.ar.config import NOISE_BLOCK
from glm_image.ar.model import Decoder
from glm_image.ar.sampler import draw
from glm_image.ar.state import DecodeState
from glm_image.devices.base import Device


class TorchStep:
    """Feeds every slot its last token and draws the next; reads nothing on the host."""

    def __init__(self, decoder: Decoder, state: DecodeState, device: Device) -> None:
        self._decoder, self._state = decoder, state
        self._attention = device.decode_attention
        self._rows = torch.arange(len(state.tokens), device=device.torch_device)

    def __call__(self) -> None:
        """Takes the step."""
        state, rows = self._state, self._rows
        cos, sin = state.cos[rows, state.lengths], state.sin[rows, state.lengths]
        logits = self._decoder.decode(state.tokens, state.lengths, cos, sin, state.cache, self._attention)
        allowed = state.allowed[(state.drawn >= state.sampler.preview_tokens).long()]
        noise = state.noise[rows, state.drawn % NOISE_BLOCK]
        state.tokens.copy_(draw(logits, noise, state.sampler, allowed))
        state.advance(rows)

"""The step of Jacobi decoding in PyTorch, for the CPU and as the reference of fused steps."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_image.ar.config import NOISE_BLOCK
from glm_image.ar.model import Decoder
from glm_image.ar.sampler import sample
from glm_image.ar.state import DecodeState
from glm_image.ar.window import Rows, Window, accept, round_up, window_rows
from glm_image.devices.base import Device


class TorchWindowStep:
    """Feeds every slot its last token and guesses, and keeps the tokens that prove right; never waits for the device.

    Products are made of as many rows at a time as those of ``TorchStep``, since libraries choose the order of sums by
    the number of rows. Blocks run in the order of the rows, so that a row finds the keys and values of those before it.

    Args:
        rows: rows of the step.
    """

    def __init__(self, decoder: Decoder, state: DecodeState, window: Window, device: Device, rows: int) -> None:
        self._decoder, self._state, self._window = decoder, state, window
        self._attention = device.window_attention
        self._block = device.step_rows(len(state.tokens))
        self._rows = round_up(rows, self._block)

    def __call__(self) -> None:
        rows = window_rows(self._state, self._window, self._rows)
        drawn = torch.cat([self._draw(block) for block in rows.blocks(self._block)])
        accept(self._state, self._window, rows, drawn)

    def _draw(self, rows: Rows) -> Tensor:
        state, slot = self._state, rows.slot
        cos, sin = state.cos[slot, rows.position], state.sin[slot, rows.position]
        seen = torch.where(rows.valid, rows.position + 1, 0)

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self._attention(query, keys, values, slot, seen)

        logits = self._decoder.decode(rows.token, slot, rows.position, cos, sin, state.cache, attention)
        following = rows.index + 1
        allowed = state.allowed[(following >= state.sampler.preview_tokens[slot]).long()]
        return sample(logits, state.noise[slot, following % NOISE_BLOCK], state.sampler.rows(slot), allowed)

"""One speculative step of all slots on the kernels; the reference is ``ar.window_step``."""

from __future__ import annotations

from torch import Tensor

from glm_image.ar.fused.decoder import FusedLayers
from glm_image.ar.fused.tiles import default_tiles, window_tiles
from glm_image.ar.model import Decoder, DecoderLayer
from glm_image.ar.state import DecodeState
from glm_image.ar.window import Window
from glm_image.kernels.sampling import sample_window
from glm_image.kernels.window_attention import WindowAttention
from glm_image.kernels.window_rows import WindowRows, WindowSlots, accept_window, embed_window


class FusedWindowStep:
    """Feeds every slot its last token and guesses, and keeps the tokens that prove right; never waits for the device.

    A token has the bits that ``FusedStep`` gives it. ``rows`` is the number of rows of the step.
    """

    def __init__(self, decoder: Decoder, state: DecodeState, window: Window, rows: int) -> None:
        config = decoder.config
        self._decoder, self._state = decoder, state
        self._rows = WindowRows.of(window.slot[:rows], window.offset[:rows])
        self._slots = WindowSlots(
            state.sampled, state.lengths, window.total, window.known, window.guess_from, state.output
        )
        self._layers = FusedLayers(decoder, rows, window_tiles(decoder, default_tiles(decoder), rows))
        self._attention = WindowAttention(
            rows, config.heads, config.kv_heads, config.head_dim, config.rotary_dim, decoder.head.weight.device
        )

    def __call__(self) -> None:
        decoder, layers, rows = self._decoder, self._layers, self._rows
        table, norm, eps = decoder.embedding.weight, layers.norms[0], decoder.config.norm_eps
        embed_window(rows, self._slots, table, norm, layers.residual, layers.normed, eps)
        self._sample(layers.logits(self._attend))
        accept_window(rows, self._slots)

    def _attend(self, layer: DecoderLayer, index: int, qkv: Tensor, out: Tensor) -> None:
        state, rows = self._state, self._rows
        cache = state.cache.keys[index], state.cache.values[index]
        self._attention(qkv, layer.qkv.bias, (state.cos, state.sin), cache, rows.slots, rows.positions, out)

    def _sample(self, logits: Tensor) -> None:
        state, rows = self._state, self._rows
        sampler = state.sampler
        sample_window(
            logits,
            state.noise,
            state.allowed,
            temperature=sampler.temperature,
            cut=sampler.cut,
            kth=sampler.kth,
            preview_tokens=sampler.preview_tokens,
            slots=rows.slots,
            indices=rows.indices,
            drawn=rows.drawn,
        )

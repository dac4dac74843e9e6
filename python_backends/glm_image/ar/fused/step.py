"""One decode step of all slots with the kernels of this package; its twin is ``ar.step``."""

from __future__ import annotations

from glm_image.ar.fused.decoder import FusedDecoder, TileConfigs
from glm_image.ar.fused.sampling import draw_tokens
from glm_image.ar.model import Decoder
from glm_image.ar.state import DecodeState


class FusedStep:
    """Feeds every slot its last token and draws the next; reads nothing on the host."""

    def __init__(self, decoder: Decoder, state: DecodeState, plans: TileConfigs | None = None) -> None:
        self._decoder, self._state = FusedDecoder(decoder, len(state.tokens), plans), state

    def __call__(self) -> None:
        """Takes the step."""
        state = self._state
        logits = self._decoder.decode(state.tokens, state.lengths, (state.cos, state.sin), state.cache)
        draw_tokens(logits, state)

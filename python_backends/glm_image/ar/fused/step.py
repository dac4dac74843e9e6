"""One decode step of all slots on the kernels; the reference is ``ar.step``."""

from __future__ import annotations

from torch import Tensor

from glm_image.ar.fused.decoder import FusedDecoder
from glm_image.ar.fused.tiles import TileConfigs
from glm_image.ar.model import Decoder
from glm_image.ar.state import DecodeState
from glm_image.kernels.sampling import sample_and_advance


class FusedStep:
    """Feeds every slot its last token and samples the next; never waits for the device."""

    def __init__(self, decoder: Decoder, state: DecodeState, tiles: TileConfigs | None = None) -> None:
        self._decoder, self._state = FusedDecoder(decoder, len(state.tokens), tiles), state

    def __call__(self) -> None:
        state = self._state
        logits = self._decoder.decode(state.tokens, state.lengths, (state.cos, state.sin), state.cache)
        sample_tokens(logits, state)


def sample_tokens(logits: Tensor, state: DecodeState) -> None:
    """Samples the next token of every slot, from fp32 logits [slots, vision_vocab_size]; advances the active slots."""
    rows = state.sampler
    sample_and_advance(
        logits,
        state.noise,
        state.allowed,
        temperature=rows.temperature,
        cut=rows.cut,
        kth=rows.kth,
        preview_tokens=rows.preview_tokens,
        sampled=state.sampled,
        tokens=state.tokens,
        lengths=state.lengths,
        active=state.active,
        output=state.output,
    )

"""What the fused decoders of all devices read of a decoder."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from glm_image.ar.model import Decoder, DecoderLayer


def layers_and_norms(decoder: Decoder) -> tuple[list[DecoderLayer], list[Tensor]]:
    """Returns the layers, and the weights of the norm before each of them and of the one after the last."""
    layers = cast("list[DecoderLayer]", list(decoder.layers))
    norms: list[Tensor] = [layer.before_attention.weight for layer in layers]
    return layers, [*norms, decoder.norm.weight]

"""The decode step with as few launches as its data needs: eight or nine per layer; weights are read once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm_image.ar.fused.layers import layers_and_norms
from glm_image.ar.fused.tiles import TileConfigs, default_tiles
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder, DecoderLayer, gathered_logits
from glm_image.devices.int8_linear import AnyLinear, Int8Linear
from glm_image.kernels.branch_sums import branch_sum
from glm_image.kernels.decode_attention import DecodeAttention
from glm_image.kernels.int8_pairs import Int8Pairs, quantize_pairs
from glm_image.kernels.residual_norm import embed_norm
from glm_image.kernels.skinny_linear import ROWS, gate_up, linear_partials, partials_buffer


def supports(decoder: Decoder, slots: int) -> bool:
    """Returns whether the kernels can run a decoder: bf16 activations, at most 16 slots, heads a power of two wide."""
    dim = decoder.config.head_dim
    return decoder.dtype == torch.bfloat16 and slots <= ROWS and dim >= ROWS and dim & (dim - 1) == 0


AttendPartials = Callable[[DecoderLayer, int, Tensor, Tensor], None]
"""Attends in a layer, given its index, the partial sums of q, k and v, and where the result goes."""


class FusedLayers:
    """The layers and the head of a decoder on the kernels, bf16 or int8, for a number of rows.

    Attributes:
        residual: bf16 [rows, hidden_size], written before ``logits``, as is ``normed``.
        normed: bf16 or int8 pairs [rows, hidden_size], its norm before the first layer.
    """

    def __init__(self, decoder: Decoder, rows: int, tiles: TileConfigs) -> None:
        config, device = decoder.config, decoder.head.weight.device
        self._decoder, self._tiles = decoder, tiles
        self._layers, self.norms = layers_and_norms(decoder)
        qkv_width = (config.heads + 2 * config.kv_heads) * config.head_dim

        def empty(width: int) -> Tensor:
            return torch.empty(rows, width, device=device, dtype=torch.bfloat16)

        self.residual = empty(config.hidden_size)
        self._attended, self._product = empty(config.heads * config.head_dim), empty(config.intermediate_size)
        self.normed: Tensor | Int8Pairs = empty(config.hidden_size)
        self._product_pairs: Int8Pairs | None = None
        if tiles.int8_pairs:
            self.normed = Int8Pairs.empty(rows, config.hidden_size, device)
            self._product_pairs = Int8Pairs.empty(rows, config.intermediate_size, device)
        self._qkv = partials_buffer(tiles.qkv, rows, qkv_width, device)
        self._out, self._down = (
            branch_sum(partials_buffer(tile, rows, config.hidden_size, device), decoder.group)
            for tile in (tiles.out, tiles.down)
        )
        self._logits = partials_buffer(tiles.head, rows, decoder.head.weight.shape[0], device)

    def logits(self, attend: AttendPartials) -> Tensor:
        """Returns the rows' logits, fp32 [rows, vision_vocab_size]; the next call overwrites them."""
        decoder, tiles, eps = self._decoder, self._tiles, self._decoder.config.norm_eps
        residual, normed, attended = self.residual, self.normed, self._attended
        for index, layer in enumerate(self._layers):
            linear_partials(normed, *weights_of(layer.qkv), self._qkv, tiles.qkv)
            attend(layer, index, self._qkv, attended)
            linear_partials(attended, *weights_of(layer.out), self._out.partials, tiles.out)
            self._out.add(residual, layer.after_attention.weight, layer.before_mlp.weight, normed, eps)
            gate_up(normed, *weights_of(layer.gate_up), self._product, tiles.gate_up)
            linear_partials(self._down_input(), *weights_of(layer.down), self._down.partials, tiles.down)
            self._down.add(residual, layer.after_mlp.weight, self.norms[index + 1], normed, eps)
        linear_partials(normed, *weights_of(decoder.head), self._logits, tiles.head, rounded=True)
        return gathered_logits(self._logits[0], decoder.group, decoder.config.vision_vocab_size)

    def _down_input(self) -> Tensor | Int8Pairs:
        if self._product_pairs is None:
            return self._product
        quantize_pairs(self._product, self._product_pairs)
        return self._product_pairs


class FusedDecoder:
    """A decoder's step on the kernels, bf16 or int8; the reference is ``Decoder.decode``.

    ``slots`` is at most 16; ``tiles`` divides the linears, None = ``default_tiles``.
    """

    def __init__(self, decoder: Decoder, slots: int, tiles: TileConfigs | None = None) -> None:
        config = decoder.config
        self._decoder, self._layers = decoder, FusedLayers(decoder, slots, tiles or default_tiles(decoder))
        self._attention = DecodeAttention(
            slots, config.heads, config.kv_heads, config.head_dim, config.rotary_dim, decoder.head.weight.device
        )

    def decode(self, tokens: Tensor, lengths: Tensor, tables: tuple[Tensor, Tensor], cache: KvCache) -> Tensor:
        """Adds one token to every slot as ``Decoder.decode`` does; the next step overwrites the logits.

        ``tables`` are cosines and sines of every position, [slots, positions, rotary_dim] each.
        """

        def attend(layer: DecoderLayer, index: int, qkv: Tensor, out: Tensor) -> None:
            self._attention(qkv, layer.qkv.bias, tables, (cache.keys[index], cache.values[index]), lengths, out)

        decoder, layers = self._decoder, self._layers
        eps = decoder.config.norm_eps
        embed_norm(tokens, decoder.embedding.weight, layers.norms[0], layers.residual, layers.normed, eps)
        return layers.logits(attend)


def weights_of(linear: AnyLinear) -> tuple[Tensor, Tensor | None]:
    """Returns a layer's matrix [n, k], and the scales [n] of its rows where it is int8."""
    return linear.weight, linear.scale if isinstance(linear, Int8Linear) else None

"""The decode step with as few launches as its data needs: eight or nine per layer; weights are read once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm_image.ar.fused.layers import layers_and_norms
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder, gathered_logits
from glm_image.devices.int8_linear import AnyLinear, Int8Linear
from glm_image.kernels.branch_sums import branch_sum
from glm_image.kernels.decode_attention import DecodeAttention
from glm_image.kernels.int8_pairs import Int8Pairs, quantize_pairs
from glm_image.kernels.residual_norm import embed_norm
from glm_image.kernels.skinny_linear import ROWS, TileConfig, gate_up, linear_partials, partials_buffer


@dataclass(frozen=True)
class TileConfigs:
    """How each linear of a layer, and the head, is divided among programs.

    Attributes:
        int8_pairs: whether activations are int8 pairs, by which int8 weights are multiplied as they are. Widening the
            weights to bf16 in registers keeps the largest matrices below the memory's bandwidth.
    """

    # The best of sweeps of whole steps at the real sizes, 8 rows: on an H100, `gate_up` and `down` on an H200.
    qkv: TileConfig = TileConfig(64, 128, split_k=2, warps=4, stages=4, fetch=256)
    out: TileConfig = TileConfig(64, 128, split_k=2, warps=4, stages=4, fetch=256)
    gate_up: TileConfig = TileConfig(128, 128, split_k=1, warps=4, stages=3, fetch=256)
    down: TileConfig = TileConfig(64, 128, split_k=4, warps=4, stages=3, fetch=0)
    head: TileConfig = TileConfig(64, 128, split_k=1, warps=4, stages=4, fetch=256)
    int8_pairs: bool = False


# The input of ``out`` stays bf16: its matrix is small, and int8 pairs of the attended heads would need a kernel more.
INT8_TILES = TileConfigs(
    qkv=TileConfig(64, 128, split_k=4, warps=4, stages=4, fetch=256),
    out=TileConfig(32, 256, split_k=2, warps=4, stages=3, fetch=256),
    gate_up=TileConfig(64, 256, split_k=1, warps=4, stages=3, fetch=256),
    down=TileConfig(64, 256, split_k=4, warps=4, stages=3, fetch=256),
    head=TileConfig(64, 256, split_k=1, warps=4, stages=4, fetch=256),
    int8_pairs=True,
)


def default_tiles(decoder: Decoder) -> TileConfigs:
    """Returns the best known tiles for a decoder, or for a rank's part of it."""
    tiles = INT8_TILES if isinstance(decoder.head, Int8Linear) else TileConfigs()
    if decoder.group.size == 1:
        return tiles
    # A collectives library gathers every partial sum. With six tiles in flight two sums are as fast as four, on 2 H100.
    stages = tiles.down.stages if tiles.int8_pairs else 6
    return replace(tiles, down=replace(tiles.down, split_k=2, stages=stages))


def supports(decoder: Decoder, slots: int) -> bool:
    """Returns whether the kernels can run a decoder: bf16 activations, at most 16 slots, heads a power of two wide."""
    dim = decoder.config.head_dim
    return decoder.dtype == torch.bfloat16 and slots <= ROWS and dim >= ROWS and dim & (dim - 1) == 0


class FusedDecoder:
    """A decoder's step on the kernels, bf16 or int8; the reference is ``Decoder.decode``.

    ``slots`` is at most 16; ``tiles`` divides the linears, None = ``default_tiles``.
    """

    def __init__(self, decoder: Decoder, slots: int, tiles: TileConfigs | None = None) -> None:
        config, device = decoder.config, decoder.head.weight.device
        self._decoder, self._tiles = decoder, tiles or default_tiles(decoder)
        qkv_width = (config.heads + 2 * config.kv_heads) * config.head_dim

        def rows(width: int) -> Tensor:
            return torch.empty(slots, width, device=device, dtype=torch.bfloat16)

        self._residual = rows(config.hidden_size)
        self._attended, self._product = rows(config.heads * config.head_dim), rows(config.intermediate_size)
        self._normed: Tensor | Int8Pairs = rows(config.hidden_size)
        self._product_pairs: Int8Pairs | None = None
        if self._tiles.int8_pairs:
            self._normed = Int8Pairs.empty(slots, config.hidden_size, device)
            self._product_pairs = Int8Pairs.empty(slots, config.intermediate_size, device)
        self._qkv = partials_buffer(self._tiles.qkv, slots, qkv_width, device)
        self._out, self._down = (
            branch_sum(partials_buffer(tiles, slots, config.hidden_size, device), decoder.group)
            for tiles in (self._tiles.out, self._tiles.down)
        )
        self._logits = partials_buffer(self._tiles.head, slots, decoder.head.weight.shape[0], device)
        self._attention = DecodeAttention(
            slots, config.heads, config.kv_heads, config.head_dim, config.rotary_dim, device
        )

    def decode(self, tokens: Tensor, lengths: Tensor, tables: tuple[Tensor, Tensor], cache: KvCache) -> Tensor:
        """Adds one token to every slot as ``Decoder.decode`` does; the next step overwrites the logits.

        ``tables`` are cosines and sines of every position, [slots, positions, rotary_dim] each.
        """
        decoder, tiles, eps = self._decoder, self._tiles, self._decoder.config.norm_eps
        residual, normed, attended = self._residual, self._normed, self._attended
        layers, norms = layers_and_norms(decoder)
        embed_norm(tokens, decoder.embedding.weight, norms[0], residual, normed, eps)
        for index, layer in enumerate(layers):
            linear_partials(normed, *weights_of(layer.qkv), self._qkv, tiles.qkv)
            layer_cache = (cache.keys[index], cache.values[index])
            self._attention(self._qkv, layer.qkv.bias, tables, layer_cache, lengths, attended)
            linear_partials(attended, *weights_of(layer.out), self._out.partials, tiles.out)
            self._out.add(residual, layer.after_attention.weight, layer.before_mlp.weight, normed, eps)
            gate_up(normed, *weights_of(layer.gate_up), self._product, tiles.gate_up)
            linear_partials(self._down_input(), *weights_of(layer.down), self._down.partials, tiles.down)
            self._down.add(residual, layer.after_mlp.weight, norms[index + 1], normed, eps)
        linear_partials(normed, *weights_of(decoder.head), self._logits, tiles.head, rounded=True)
        return gathered_logits(self._logits[0], decoder.group, decoder.config.vision_vocab_size)

    def _down_input(self) -> Tensor | Int8Pairs:
        if self._product_pairs is None:
            return self._product
        quantize_pairs(self._product, self._product_pairs)
        return self._product_pairs


def weights_of(linear: AnyLinear) -> tuple[Tensor, Tensor | None]:
    """Returns a layer's matrix [n, k], and the scales [n] of its rows where it is int8."""
    return linear.weight, linear.scale if isinstance(linear, Int8Linear) else None

"""The decode step with as few launches as its data needs: eight or nine a layer, each reading its weights once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder, DecoderLayer, gathered_logits
from glm_image.devices.int8_linear import Int8Linear
from glm_image.kernels.branch_sums import branch_sum
from glm_image.kernels.decode_attention import DecodeAttention
from glm_image.kernels.residual_norm import embed_norm
from glm_image.kernels.skinny_linear import ROWS, TileConfig, gate_up, linear_partials, partials_buffer
from glm_image.kernels.split_rows import SplitRows, split_rows


@dataclass(frozen=True)
class TileConfigs:
    """How each linear of a layer, and the head, is cut up.

    Attributes:
        split: whether activations come in two int8 parts, by which int8 weights can be multiplied as they are. Widening
            the weights to bf16 in registers keeps the largest matrices from the memory's bandwidth.
    """

    # The best of a sweep on an H100 at the real sizes, 8 rows.
    qkv: TileConfig = TileConfig(64, 128, splits=2, warps=4, stages=4, fetch=256)
    out: TileConfig = TileConfig(64, 128, splits=2, warps=4, stages=4, fetch=256)
    gate_up: TileConfig = TileConfig(64, 128, splits=1, warps=4, stages=4, fetch=512)
    down: TileConfig = TileConfig(64, 128, splits=4, warps=4, stages=3, fetch=256)
    head: TileConfig = TileConfig(64, 128, splits=1, warps=4, stages=4, fetch=256)
    split: bool = False


# What the heads attended to is widened all the same: its matrix is small, and splitting it would be a kernel more.
INT8_TILES = TileConfigs(
    qkv=TileConfig(64, 128, splits=4, warps=4, stages=4, fetch=256),
    out=TileConfig(32, 256, splits=2, warps=4, stages=3, fetch=256),
    gate_up=TileConfig(64, 256, splits=1, warps=4, stages=3, fetch=512),
    down=TileConfig(64, 256, splits=4, warps=4, stages=3, fetch=256),
    head=TileConfig(64, 256, splits=1, warps=4, stages=4, fetch=256),
    split=True,
)


def default_tiles(decoder: Decoder) -> TileConfigs:
    """Returns the best known plans for a decoder, or a rank's part of it."""
    plans = INT8_TILES if isinstance(decoder.head, Int8Linear) else TileConfigs()
    if decoder.group.size == 1:
        return plans
    # A library of collectives gathers every part. With six tiles in flight two parts are as fast as four, on two H100.
    stages = plans.down.stages if plans.split else 6
    return replace(plans, down=replace(plans.down, splits=2, stages=stages))


def supports(decoder: Decoder, slots: int) -> bool:
    """Tells whether the kernels can run a decoder: bf16 activations, at most 16 slots, heads a power of two wide."""
    dim = decoder.config.head_dim
    return decoder.dtype == torch.bfloat16 and slots <= ROWS and dim >= ROWS and dim & (dim - 1) == 0


class FusedDecoder:
    """Runs a decoder's step with the kernels of this package; ``Decoder.decode`` is its twin.

    Args:
        decoder: holds the weights, bf16 or int8.
        slots: rows of the batch, at most 16.
        plans: how the linears are cut up.
    """

    def __init__(self, decoder: Decoder, slots: int, plans: TileConfigs | None = None) -> None:
        config, device = decoder.config, decoder.head.weight.device
        self._decoder, self._plans = decoder, plans or default_tiles(decoder)
        qkv_width = (config.heads + 2 * config.kv_heads) * config.head_dim

        def rows(width: int) -> Tensor:
            return torch.empty(slots, width, device=device, dtype=torch.bfloat16)

        self._residual = rows(config.hidden_size)
        self._attended, self._product = rows(config.heads * config.head_dim), rows(config.intermediate_size)
        self._normed: Tensor | SplitRows = rows(config.hidden_size)
        self._product_read: Tensor | SplitRows = self._product
        if self._plans.split:
            self._normed = SplitRows.empty(slots, config.hidden_size, device)
            self._product_read = SplitRows.empty(slots, config.intermediate_size, device)
        self._qkv = partials_buffer(self._plans.qkv, slots, qkv_width, device)
        self._out, self._down = (
            branch_sum(partials_buffer(plan, slots, config.hidden_size, device), decoder.group)
            for plan in (self._plans.out, self._plans.down)
        )
        self._logits = partials_buffer(self._plans.head, slots, decoder.head.weight.shape[0], device)
        self._attention = DecodeAttention(
            slots, config.heads, config.kv_heads, config.head_dim, config.rotary_dim, device
        )

    def decode(self, tokens: Tensor, lengths: Tensor, tables: tuple[Tensor, Tensor], cache: KvCache) -> Tensor:
        """Adds one token to every slot.

        Args:
            tokens: int64 [slots].
            lengths: int64 [slots]: positions a slot has before this token.
            tables: cosines and sines of every position, [slots, positions, rotary_dim] each.
            cache: read and written.

        Returns:
            fp32 logits [slots, vision_vocab_size], overwritten by the next step.
        """
        decoder, plans, eps = self._decoder, self._plans, self._decoder.config.norm_eps
        layers = cast("list[DecoderLayer]", list(decoder.layers))
        befores = [layer.before_attention.weight for layer in layers[1:]] + [decoder.norm.weight]
        first = layers[0].before_attention.weight
        embed_norm(tokens, decoder.embedding.weight, first, self._residual, self._normed, eps)
        for index, (layer, next_before) in enumerate(zip(layers, befores, strict=True)):
            linear_partials(self._normed, layer.qkv, self._qkv, plans.qkv)
            layer_cache = (cache.keys[index], cache.values[index])
            self._attention(self._qkv, layer.qkv.bias, tables, layer_cache, lengths, self._attended)
            linear_partials(self._attended, layer.out, self._out.parts, plans.out)
            after, before = layer.after_attention.weight, layer.before_mlp.weight
            self._out.add(self._residual, after, before, self._normed, eps)
            gate_up(self._normed, layer.gate_up, self._product, plans.gate_up)
            if isinstance(self._product_read, SplitRows):
                split_rows(self._product, self._product_read)
            linear_partials(self._product_read, layer.down, self._down.parts, plans.down)
            self._down.add(self._residual, layer.after_mlp.weight, next_before, self._normed, eps)
        linear_partials(self._normed, decoder.head, self._logits, plans.head, rounded=True)
        return gathered_logits(self._logits[0], decoder.group, decoder.config.vision_vocab_size)

"""How the linears of a decode step are divided among programs: found by sweeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from glm_image.ar.model import Decoder
from glm_image.devices.int8_linear import Int8Linear
from glm_image.kernels.skinny_linear import TileConfig


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


WIDE_ROWS: Final = (32, 64)
"""Rows of input beyond which other tiles are faster."""

# Block of rows of weights, block of columns, stages and warps, by ``int8_pairs``: the best of a sweep on an H200.
_Fitted = dict[bool, dict[str, tuple[int, int, int, int]]]
WIDE_TILES: Final[_Fitted] = {
    False: {"qkv": (128, 128, 4, 4), "gate_up": (64, 128, 2, 4), "head": (128, 128, 4, 4)},
    True: {
        "qkv": (64, 128, 3, 4),
        "gate_up": (64, 128, 3, 4),
        "down": (64, 128, 4, 4),
        "head": (64, 128, 4, 4),
    },
}
WIDEST_TILES: Final[_Fitted] = {
    False: {
        "qkv": (128, 128, 3, 4),
        "gate_up": (128, 64, 4, 8),
        "down": (128, 128, 3, 4),
        "head": (128, 128, 3, 4),
    },
    True: {
        "qkv": (64, 128, 4, 8),
        "gate_up": (64, 128, 4, 8),
        "down": (128, 128, 3, 8),
        "head": (128, 128, 3, 8),
    },
}
FALLBACK_STAGES: Final = 2
"""Where the blocks of columns must stay as wide as they are, fewer of them fit into shared memory."""


def window_tiles(decoder: Decoder, tiles: TileConfigs, rows: int) -> TileConfigs:
    """Returns tiles for a number of rows of input, with which every row has the bits that ``tiles`` give it.

    The instructions add columns in order, so no bit depends on a block's size, but on where a share of split-K ends.
    """
    if rows <= WIDE_ROWS[0]:
        return tiles
    columns = {"down": decoder.config.intermediate_size, "out": decoder.config.heads * decoder.config.head_dim}
    fitted = (WIDE_TILES if rows <= WIDE_ROWS[1] else WIDEST_TILES)[tiles.int8_pairs]
    changed: dict[str, Any] = {}
    for name, (block_n, block_k, stages, warps) in fitted.items():
        tile: TileConfig = getattr(tiles, name)
        wanted = replace(tile, block_n=block_n, block_k=block_k, stages=stages, warps=warps)
        width = columns.get(name, decoder.config.hidden_size)
        if share_columns(width, wanted) == share_columns(width, tile):
            changed[name] = wanted
        else:
            changed[name] = replace(tile, stages=min(tile.stages, FALLBACK_STAGES))
    return replace(tiles, **changed)


def share_columns(columns: int, tile: TileConfig) -> int:
    """Returns how many of a matrix's columns a share of split-K has, all of them without split-K."""
    blocks = -(-columns // tile.block_k)
    return min(columns, -(-blocks // tile.split_k) * tile.block_k)
